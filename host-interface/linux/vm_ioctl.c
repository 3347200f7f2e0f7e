// SPDX-License-Identifier: GPL-2.0-only
/*
 * The file that a VM is to userspace, and what the module says that it can do.
 */

#include <linux/cpumask.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/uaccess.h>

#include <asm/cpufeature.h>

#include "ravelin_kvm.h"

int rv_check_extension(struct rv_vm *vm, long cap)
{
	switch (cap) {
	case KVM_CAP_USER_MEMORY:
	case KVM_CAP_USER_MEMORY2:
	case KVM_CAP_SYNC_MMU:
	case KVM_CAP_DESTROY_MEMORY_REGION_WORKS:
	case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS:
	case KVM_CAP_ONE_REG:
	case KVM_CAP_MP_STATE:
	case KVM_CAP_ARM_PSCI:
	case KVM_CAP_ARM_PSCI_0_2:
	case KVM_CAP_IMMEDIATE_EXIT:
	case KVM_CAP_INTERNAL_ERROR_DATA:
	case KVM_CAP_ENABLE_CAP_VM:
	case KVM_CAP_CHECK_EXTENSION_VM:
	case KVM_CAP_DEVICE_CTRL:
	case KVM_CAP_IRQCHIP:
	case KVM_CAP_IRQFD:
	case KVM_CAP_SIGNAL_MSI:
	case KVM_CAP_IOEVENTFD:
	case KVM_CAP_IOEVENTFD_ANY_LENGTH:
	case KVM_CAP_GUEST_MEMFD:
	case KVM_CAP_MEMORY_FAULT_INFO:
	case KVM_CAP_PRE_FAULT_MEMORY:
		return 1;
	case KVM_CAP_IRQ_ROUTING:
		return RV_MAX_ROUTES;
	case KVM_CAP_GUEST_MEMFD_FLAGS:
		return RV_GMEM_FLAGS;
	case KVM_CAP_EXIT_HYPERCALL:
		return BIT(KVM_HC_MAP_GPA_RANGE);
	case KVM_CAP_ARM_VM_IPA_SIZE:
		return rv_max_ipa_bits;
	case KVM_CAP_NR_VCPUS:
		return min_t(u32, num_online_cpus(), RAVELIN_MAX_VCPUS);
	case KVM_CAP_MAX_VCPUS:
	case KVM_CAP_MAX_VCPU_ID:
		return RAVELIN_MAX_VCPUS;
	case KVM_CAP_NR_MEMSLOTS:
		return RV_MAX_SLOTS;
	case KVM_CAP_ARM_PTRAUTH_ADDRESS:
		return system_supports_address_auth();
	case KVM_CAP_ARM_PTRAUTH_GENERIC:
		return system_supports_generic_auth();
	default:
		return 0;
	}
}

static int rv_enable_cap(struct rv_vm *vm, const struct kvm_enable_cap __user *user)
{
	struct kvm_enable_cap cap;

	if (copy_from_user(&cap, user, sizeof(cap)))
		return -EFAULT;
	if (cap.flags || cap.cap != KVM_CAP_EXIT_HYPERCALL ||
	    cap.args[0] & ~(u64)BIT(KVM_HC_MAP_GPA_RANGE))
		return -EINVAL;
	WRITE_ONCE(vm->hypercall_exits, cap.args[0]);
	return 0;
}

static int rv_memory_region_ioctl(struct rv_vm *vm, unsigned int ioctl, void __user *argp)
{
	struct kvm_userspace_memory_region2 region = {};
	size_t size = sizeof(region);
	int ret;

	/* The older structure is the beginning of the newer one. */
	if (ioctl == KVM_SET_USER_MEMORY_REGION)
		size = sizeof(struct kvm_userspace_memory_region);
	if (copy_from_user(&region, argp, size))
		return -EFAULT;
	if (ioctl == KVM_SET_USER_MEMORY_REGION && region.flags & KVM_MEM_GUEST_MEMFD)
		return -EINVAL;

	down_write(&vm->slots_lock);
	ret = rv_set_memory_region(vm, &region);
	up_write(&vm->slots_lock);
	return ret;
}

static int rv_preferred_target(struct kvm_vcpu_init __user *user)
{
	struct kvm_vcpu_init init = { .target = KVM_ARM_TARGET_GENERIC_V8 };

	return copy_to_user(user, &init, sizeof(init)) ? -EFAULT : 0;
}

static int rv_guest_memfd_ioctl(struct rv_vm *vm, void __user *argp)
{
	struct kvm_create_guest_memfd args;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	return rv_gmem_create(vm, &args);
}

static int rv_create_device_ioctl(struct rv_vm *vm, void __user *argp)
{
	struct kvm_create_device args;
	int ret;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	ret = rv_vgic_create(vm, &args);
	if (ret)
		return ret;
	return copy_to_user(argp, &args, sizeof(args)) ? -EFAULT : 0;
}

static int rv_irq_ioctl(struct rv_vm *vm, unsigned int ioctl, void __user *argp)
{
	union {
		struct kvm_irq_level level;
		struct kvm_msi msi;
		struct kvm_irqfd irqfd;
		struct kvm_ioeventfd ioeventfd;
	} args;

	if (copy_from_user(&args, argp, _IOC_SIZE(ioctl)))
		return -EFAULT;
	switch (ioctl) {
	case KVM_IRQ_LINE:
		return rv_irq_line(vm, &args.level);
	case KVM_SIGNAL_MSI:
		return rv_signal_msi(vm, &args.msi);
	case KVM_IRQFD:
		return rv_irqfd(vm, &args.irqfd);
	default:
		return rv_ioeventfd(vm, &args.ioeventfd);
	}
}

static long rv_vm_ioctl(struct file *file, unsigned int ioctl, unsigned long arg)
{
	struct rv_vm *vm = file->private_data;
	void __user *argp = (void __user *)arg;
	int ret;

	ret = rv_vm_check_mm(vm);
	if (ret)
		return ret;
	switch (ioctl) {
	case KVM_CHECK_EXTENSION:
		return rv_check_extension(vm, arg);
	case KVM_ENABLE_CAP:
		return rv_enable_cap(vm, argp);
	case KVM_CREATE_VCPU:
		return rv_vcpu_create(vm, arg);
	case KVM_SET_USER_MEMORY_REGION:
	case KVM_SET_USER_MEMORY_REGION2:
		return rv_memory_region_ioctl(vm, ioctl, argp);
	case KVM_CREATE_GUEST_MEMFD:
		return rv_guest_memfd_ioctl(vm, argp);
	case KVM_ARM_PREFERRED_TARGET:
		return rv_preferred_target(argp);
	case KVM_CREATE_DEVICE:
		return rv_create_device_ioctl(vm, argp);
	case KVM_IRQ_LINE:
	case KVM_SIGNAL_MSI:
	case KVM_IRQFD:
	case KVM_IOEVENTFD:
		return rv_irq_ioctl(vm, ioctl, argp);
	case KVM_SET_GSI_ROUTING:
		return rv_set_gsi_routing(vm, argp);
	default:
		return -ENOTTY;
	}
}

static int rv_vm_fd_release(struct inode *inode, struct file *file)
{
	struct rv_vm *vm = file->private_data;

	rv_irq_close(vm);
	rv_vm_put(vm);
	return 0;
}

const struct file_operations rv_vm_fops = {
	.owner = THIS_MODULE,
	.release = rv_vm_fd_release,
	.unlocked_ioctl = rv_vm_ioctl,
	.llseek = noop_llseek,
};
