// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/kvm on the hypervisor Ravelin.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpuhotplug.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/irqdomain.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/of.h>
#include <linux/of_irq.h>
#include <linux/percpu.h>
#include <linux/reboot.h>
#include <linux/suspend.h>

#include "ravelin_kvm.h"

/*
 * Private interrupts of EL2. They end a guest's run only while they are enabled on the CPU, and
 * only the host can do that. They have nothing to say to it.
 */
static struct rv_ppi {
	const char *name;
	const char *compatible;
	int index;
	unsigned int irq;
} rv_ppis[] = {
	{ "ravelin-maintenance", "arm,gic-v3", 0 },
	{ "ravelin-timer", "arm,armv8-timer", 3 },
};

static int __percpu *rv_ppi_cookie;
static int rv_cpuhp_state;

static irqreturn_t rv_ppi_handler(int irq, void *cookie)
{
	return IRQ_HANDLED;
}

static int rv_cpu_online(unsigned int cpu)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(rv_ppis); i++) {
		if (rv_ppis[i].irq)
			enable_percpu_irq(rv_ppis[i].irq, IRQ_TYPE_NONE);
	}
	return 0;
}

static int rv_cpu_offline(unsigned int cpu)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(rv_ppis); i++) {
		if (rv_ppis[i].irq)
			disable_percpu_irq(rv_ppis[i].irq);
	}
	return 0;
}

static void rv_free_ppis(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(rv_ppis); i++) {
		if (rv_ppis[i].irq)
			free_percpu_irq(rv_ppis[i].irq, rv_ppi_cookie);
		rv_ppis[i].irq = 0;
	}
	free_percpu(rv_ppi_cookie);
}

/* Without one of them guests run all the same, with later timers. */
static void rv_request_ppi(struct rv_ppi *ppi)
{
	struct device_node *node;
	unsigned int irq;

	node = of_find_compatible_node(NULL, NULL, ppi->compatible);
	irq = irq_of_parse_and_map(node, ppi->index);
	of_node_put(node);
	if (!irq || request_percpu_irq(irq, rv_ppi_handler, ppi->name, rv_ppi_cookie)) {
		pr_warn("no interrupt %s: timers of guests will be late\n", ppi->name);
		return;
	}
	ppi->irq = irq;
}

static int rv_setup_ppis(void)
{
	int i, state;

	rv_ppi_cookie = alloc_percpu(int);
	if (!rv_ppi_cookie)
		return -ENOMEM;

	for (i = 0; i < ARRAY_SIZE(rv_ppis); i++)
		rv_request_ppi(&rv_ppis[i]);

	state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "kvm/ravelin:online",
				  rv_cpu_online, rv_cpu_offline);
	if (state < 0) {
		rv_free_ppis();
		return state;
	}
	rv_cpuhp_state = state;
	return 0;
}

static void rv_remove_ppis(void)
{
	cpuhp_remove_state(rv_cpuhp_state);
	rv_free_ppis();
}

/* An image of memory would lack what VMs have, and the hypervisor would know none of them. */
static int rv_pm_notify(struct notifier_block *block, unsigned long event, void *unused)
{
	bool refuse = event == PM_HIBERNATION_PREPARE && rv_vms_exist();

	return notifier_from_errno(refuse ? -EBUSY : 0);
}

/*
 * By kexec another kernel gets the machine, and would come upon pages of guests. A kernel that
 * crashes leaves memory alone.
 */
static int rv_reboot_notify(struct notifier_block *block, unsigned long event, void *unused)
{
	rv_vms_end();
	return NOTIFY_DONE;
}

static struct notifier_block rv_reboot_block = {
	.notifier_call = rv_reboot_notify,
};

static struct notifier_block rv_pm_block = {
	.notifier_call = rv_pm_notify,
};

static long rv_dev_ioctl(struct file *file, unsigned int ioctl, unsigned long arg)
{
	switch (ioctl) {
	case KVM_GET_API_VERSION:
		return arg ? -EINVAL : KVM_API_VERSION;
	case KVM_CREATE_VM:
		return rv_vm_create(arg);
	case KVM_CHECK_EXTENSION:
		return rv_check_extension(NULL, arg);
	case KVM_GET_VCPU_MMAP_SIZE:
		return arg ? -EINVAL : PAGE_SIZE;
	default:
		return -ENOTTY;
	}
}

static const struct file_operations rv_dev_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = rv_dev_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice rv_dev = {
	.minor = KVM_MINOR,
	.name = "kvm",
	.fops = &rv_dev_fops,
};

static int __init rv_init(void)
{
	int ret;

	if (PAGE_SIZE != RAVELIN_PAGE_SIZE)
		return -ENODEV;
	ret = rv_hyp_probe();
	if (ret)
		return ret;
	ret = rv_vm_setup();
	if (ret)
		return ret;
	rv_vcpu_setup();
	ret = rv_irq_setup();
	if (ret)
		return ret;
	ret = rv_setup_ppis();
	if (ret)
		goto exit_irq;
	ret = register_pm_notifier(&rv_pm_block);
	if (ret)
		goto remove_ppis;
	ret = register_reboot_notifier(&rv_reboot_block);
	if (ret)
		goto remove_pm_notifier;
	/*
	 * The last step, for from here on VMs can be made. EBUSY if Linux's own KVM works here.
	 */
	ret = misc_register(&rv_dev);
	if (ret)
		goto remove_reboot_notifier;
	rv_debugfs_init();
	return 0;

remove_reboot_notifier:
	unregister_reboot_notifier(&rv_reboot_block);
remove_pm_notifier:
	unregister_pm_notifier(&rv_pm_block);
remove_ppis:
	rv_remove_ppis();
exit_irq:
	rv_irq_exit();
	return ret;
}

static void __exit rv_exit(void)
{
	rv_debugfs_exit();
	misc_deregister(&rv_dev);
	unregister_reboot_notifier(&rv_reboot_block);
	unregister_pm_notifier(&rv_pm_block);
	rv_remove_ppis();
	rv_irq_exit();
	rv_vcpu_exit();
}

module_init(rv_init);
module_exit(rv_exit);
MODULE_DESCRIPTION("KVM interface to the Ravelin hypervisor");
MODULE_AUTHOR("Ravelin authors");
MODULE_LICENSE("GPL");
MODULE_ALIAS_MISCDEV(KVM_MINOR);
MODULE_ALIAS("devname:kvm");
