// SPDX-License-Identifier: GPL-2.0-only
/*
 * The file that a vCPU is to userspace.
 */

#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "ravelin_kvm.h"

/* Features of a vCPU that KVM_ARM_VCPU_INIT may ask for. */
static u32 rv_vcpu_features(void)
{
	u32 features = BIT(KVM_ARM_VCPU_POWER_OFF) | BIT(KVM_ARM_VCPU_PSCI_0_2);

	if (rv_check_extension(NULL, KVM_CAP_ARM_PTRAUTH_ADDRESS))
		features |= BIT(KVM_ARM_VCPU_PTRAUTH_ADDRESS);
	if (rv_check_extension(NULL, KVM_CAP_ARM_PTRAUTH_GENERIC))
		features |= BIT(KVM_ARM_VCPU_PTRAUTH_GENERIC);
	return features;
}

static int rv_check_init(const struct kvm_vcpu_init *init)
{
	int i;

	for (i = 1; i < ARRAY_SIZE(init->features); i++) {
		if (init->features[i])
			return -ENOENT;
	}
	if (init->features[0] & ~rv_vcpu_features())
		return -EINVAL;
	return init->target == KVM_ARM_TARGET_GENERIC_V8 ? 0 : -EINVAL;
}

static int rv_vcpu_init(struct rv_vcpu *vcpu, const struct kvm_vcpu_init __user *user)
{
	struct rv_vm *vm = vcpu->vm;
	struct kvm_vcpu_init init;
	u32 features;
	int ret;

	if (copy_from_user(&init, user, sizeof(init)))
		return -EFAULT;
	ret = rv_check_init(&init);
	if (ret)
		return ret;
	features = init.features[0] & ~BIT(KVM_ARM_VCPU_POWER_OFF);
	if (vcpu->initialized && vcpu->features != features)
		return -EINVAL;
	/* A second time it is what a VMM does when the guest starts anew. */
	ret = rv_vm_reset(vm);
	if (ret)
		return ret;

	mutex_lock(&vm->lock);
	vcpu->features = features;
	vcpu->starts_off = init.features[0] & BIT(KVM_ARM_VCPU_POWER_OFF);
	vcpu->powered = !vcpu->starts_off;
	vcpu->pending = RV_PENDING_NONE;
	vcpu->initialized = true;
	rv_regs_reset(vcpu);
	mutex_unlock(&vm->lock);
	return 0;
}

static int rv_get_mp_state(struct rv_vcpu *vcpu, struct kvm_mp_state __user *user)
{
	struct kvm_mp_state state = { .mp_state = KVM_MP_STATE_STOPPED };

	/* Who was turned on while its thread was elsewhere has been woken. */
	if (vcpu->powered || (READ_ONCE(vcpu->vm->phase) == RV_LIVE && READ_ONCE(vcpu->woken)))
		state.mp_state = KVM_MP_STATE_RUNNABLE;
	return copy_to_user(user, &state, sizeof(state)) ? -EFAULT : 0;
}

static int rv_set_mp_state(struct rv_vcpu *vcpu, const struct kvm_mp_state __user *user)
{
	struct rv_vm *vm = vcpu->vm;
	struct kvm_mp_state state;
	bool stopped;
	int ret = 0;

	if (copy_from_user(&state, user, sizeof(state)))
		return -EFAULT;
	if (state.mp_state != KVM_MP_STATE_STOPPED && state.mp_state != KVM_MP_STATE_RUNNABLE)
		return -EINVAL;
	stopped = state.mp_state == KVM_MP_STATE_STOPPED;

	mutex_lock(&vm->lock);
	if (vm->phase == RV_NEW) {
		vcpu->starts_off = stopped;
		vcpu->powered = !stopped;
	} else if (stopped == vcpu->powered) {
		/* Only the guest turns a vCPU on or off that has started. */
		ret = -EPERM;
	}
	mutex_unlock(&vm->lock);
	return ret;
}

static int rv_pre_fault_page(struct rv_vm *vm, u64 gpa)
{
	struct rv_slot *slot;
	int ret;

	down_read(&vm->slots_lock);
	slot = rv_slot_find(vm, gpa);
	if (!slot)
		ret = -ENOENT;
	else if (vm->phase != RV_LIVE)
		ret = vm->phase == RV_DEAD ? -EIO : -EOPNOTSUPP;
	else
		ret = rv_slot_fault(slot, gpa);
	up_read(&vm->slots_lock);
	return ret;
}

static int rv_pre_fault(struct rv_vm *vm, struct kvm_pre_fault_memory __user *user)
{
	struct kvm_pre_fault_memory range;
	bool some = false;
	int ret = 0;

	if (copy_from_user(&range, user, sizeof(range)))
		return -EFAULT;
	if (range.flags || memchr_inv(range.padding, 0, sizeof(range.padding)))
		return -EINVAL;
	if (!PAGE_ALIGNED(range.gpa) || !PAGE_ALIGNED(range.size) || !range.size ||
	    range.gpa + range.size < range.gpa)
		return -EINVAL;

	while (range.size) {
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		ret = rv_pre_fault_page(vm, range.gpa);
		if (ret)
			break;
		range.gpa += PAGE_SIZE;
		range.size -= PAGE_SIZE;
		some = true;
		cond_resched();
	}
	if (copy_to_user(user, &range, sizeof(range)))
		return -EFAULT;
	/* Like read(), it has succeeded if there is progress. */
	return some ? 0 : ret;
}

static long rv_one_reg_ioctl(struct rv_vcpu *vcpu, unsigned int ioctl, void __user *argp)
{
	struct kvm_one_reg reg;

	if (!vcpu->initialized)
		return -ENOEXEC;
	if (copy_from_user(&reg, argp, sizeof(reg)))
		return -EFAULT;
	if (ioctl == KVM_SET_ONE_REG)
		return rv_set_one_reg(vcpu, &reg);
	return rv_get_one_reg(vcpu, &reg);
}

static long rv_vcpu_locked_ioctl(struct rv_vcpu *vcpu, unsigned int ioctl, unsigned long arg)
{
	void __user *argp = (void __user *)arg;

	switch (ioctl) {
	case KVM_RUN:
		return arg ? -EINVAL : rv_vcpu_run(vcpu);
	case KVM_ARM_VCPU_INIT:
		return rv_vcpu_init(vcpu, argp);
	case KVM_GET_ONE_REG:
	case KVM_SET_ONE_REG:
		return rv_one_reg_ioctl(vcpu, ioctl, argp);
	case KVM_GET_REG_LIST:
		return vcpu->initialized ? rv_get_reg_list(argp) : -ENOEXEC;
	case KVM_GET_MP_STATE:
		return rv_get_mp_state(vcpu, argp);
	case KVM_SET_MP_STATE:
		return rv_set_mp_state(vcpu, argp);
	case KVM_PRE_FAULT_MEMORY:
		return rv_pre_fault(vcpu->vm, argp);
	default:
		return -ENOTTY;
	}
}

static long rv_vcpu_ioctl(struct file *file, unsigned int ioctl, unsigned long arg)
{
	struct rv_vcpu *vcpu = file->private_data;
	long ret;

	ret = rv_vm_check_mm(vcpu->vm);
	if (ret)
		return ret;
	if (mutex_lock_killable(&vcpu->lock))
		return -EINTR;
	ret = rv_vcpu_locked_ioctl(vcpu, ioctl, arg);
	mutex_unlock(&vcpu->lock);
	return ret;
}

static vm_fault_t rv_run_fault(struct vm_fault *vmf)
{
	struct rv_vcpu *vcpu = vmf->vma->vm_file->private_data;

	if (vmf->pgoff)
		return VM_FAULT_SIGBUS;
	vmf->page = virt_to_page(vcpu->run);
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct rv_run_vm_ops = {
	.fault = rv_run_fault,
};

static int rv_vcpu_mmap(struct file *file, struct vm_area_struct *vma)
{
	vma->vm_ops = &rv_run_vm_ops;
	return 0;
}

static int rv_vcpu_release(struct inode *inode, struct file *file)
{
	struct rv_vcpu *vcpu = file->private_data;

	rv_vm_put(vcpu->vm);
	return 0;
}

static const struct file_operations rv_vcpu_fops = {
	.owner = THIS_MODULE,
	.release = rv_vcpu_release,
	.unlocked_ioctl = rv_vcpu_ioctl,
	.mmap = rv_vcpu_mmap,
	.llseek = noop_llseek,
};

int rv_vcpu_create(struct rv_vm *vm, unsigned long id)
{
	struct rv_vcpu *vcpu;
	int ret;

	if (id >= RAVELIN_MAX_VCPUS)
		return -EINVAL;

	mutex_lock(&vm->lock);
	ret = -EBUSY;
	if (vm->phase != RV_NEW || vm->vgic.ready)
		goto unlock;
	ret = -EEXIST;
	if (xa_load(&vm->vcpus, id))
		goto unlock;

	ret = -ENOMEM;
	vcpu = rv_vcpu_alloc(vm, id);
	if (!vcpu)
		goto unlock;
	ret = xa_reserve(&vm->vcpus, id, GFP_KERNEL_ACCOUNT);
	if (ret) {
		rv_vcpu_free(vcpu);
		goto unlock;
	}
	rv_vm_get(vm);
	ret = anon_inode_getfd("kvm-vcpu", &rv_vcpu_fops, vcpu, O_RDWR | O_CLOEXEC);
	if (ret < 0) {
		rv_vm_put(vm);
		xa_release(&vm->vcpus, id);
		rv_vcpu_free(vcpu);
		goto unlock;
	}
	/* Last, and without failing: who finds a vCPU there need not fear that it goes. */
	xa_store(&vm->vcpus, id, vcpu, GFP_KERNEL_ACCOUNT);
unlock:
	mutex_unlock(&vm->lock);
	return ret;
}
