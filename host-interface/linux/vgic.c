// SPDX-License-Identifier: GPL-2.0-only
/*
 * The vGICv3 device. The hypervisor models the interrupt controller; what is
 * here is how userspace says where the guest finds it.
 */
#include <linux/anon_inodes.h>
#include <linux/bitfield.h>
#include <linux/fs.h>
#include <linux/overflow.h>
#include <linux/sizes.h>
#include <linux/uaccess.h>

#include "ravelin_kvm.h"

/* The value of KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION. */
#define RV_REGION_INDEX	GENMASK_ULL(11, 0)
#define RV_REGION_FLAGS	GENMASK_ULL(15, 12)
#define RV_REGION_BASE	GENMASK_ULL(51, 16)
#define RV_REGION_COUNT	GENMASK_ULL(63, 52)

#define RV_MIN_INTIDS	64

/* A realm has its devices in the lower half, too; they appear in the other. */
static u64 rv_address_space(const struct rv_vm *vm)
{
	return 1ULL << (vm->kind == RV_REALM ? vm->ipa_bits - 1 : vm->ipa_bits);
}

static int rv_check_range(struct rv_vm *vm, u64 base, u64 size)
{
	u64 end;

	if (!IS_ALIGNED(base, SZ_64K) || check_add_overflow(base, size, &end))
		return -EINVAL;
	return end > rv_address_space(vm) ? -E2BIG : 0;
}

/* How many redistributors the guest has: their place tells whose they are. */
static u32 rv_redists(struct rv_vm *vm)
{
	struct rv_vcpu *vcpu;
	unsigned long id;
	u32 count = 0;

	xa_for_each(&vm->vcpus, id, vcpu)
		count = id + 1;
	return count;
}

/* What the redistributors take, with the vCPUs that there are so far. */
static u64 rv_redist_size(struct rv_vm *vm)
{
	return (u64)max(vm->vgic.redists, rv_redists(vm)) *
	       KVM_VGIC_V3_REDIST_SIZE;
}

/* Whether both are where they can be. */
static int rv_check_frames(struct rv_vm *vm)
{
	const struct rv_vgic *vgic = &vm->vgic;
	u64 size = rv_redist_size(vm);
	int ret;

	ret = rv_check_range(vm, vgic->redist, size);
	if (ret)
		return ret;
	return vgic->dist < vgic->redist + size &&
	       vgic->redist < vgic->dist + KVM_VGIC_V3_DIST_SIZE ? -EINVAL : 0;
}

static int rv_set_dist(struct rv_vm *vm, u64 base)
{
	struct rv_vgic *vgic = &vm->vgic;
	int ret;

	if (vgic->has_dist)
		return -EEXIST;
	ret = rv_check_range(vm, base, KVM_VGIC_V3_DIST_SIZE);
	if (ret)
		return ret;
	vgic->dist = base;
	/* Messages are compared with it without a lock: see rv_msi(). */
	smp_store_release(&vgic->has_dist, true);
	return 0;
}

/* A region with a count, or, if it is 0, of as many as there are vCPUs. */
static int rv_set_redist(struct rv_vm *vm, u64 base, u32 count)
{
	struct rv_vgic *vgic = &vm->vgic;
	u64 size = (u64)count * KVM_VGIC_V3_REDIST_SIZE;
	int ret;

	/* The two ways to set it do not mix, and there is one region. */
	if (vgic->has_redist)
		return count || vgic->redists ? -EINVAL : -EEXIST;
	ret = rv_check_range(vm, base, size);
	if (ret)
		return ret;
	vgic->redist = base;
	vgic->redists = count;
	if (vgic->has_dist)
		ret = rv_check_frames(vm);
	vgic->has_redist = !ret;
	return ret;
}

static int rv_set_region(struct rv_vm *vm, u64 value)
{
	u32 count = FIELD_GET(RV_REGION_COUNT, value);

	/* The hypervisor has them in one piece. */
	if (!count || value & RV_REGION_FLAGS || value & RV_REGION_INDEX)
		return -EINVAL;
	return rv_set_redist(vm, value & RV_REGION_BASE, count);
}

static int rv_get_region(const struct rv_vgic *vgic, u64 *value)
{
	if (*value & RV_REGION_INDEX || !vgic->has_redist)
		return -ENOENT;
	*value = vgic->redist | FIELD_PREP(RV_REGION_COUNT, vgic->redists);
	return 0;
}

static int rv_set_address(struct rv_vm *vm, u64 attr, u64 value)
{
	switch (attr) {
	case KVM_VGIC_V3_ADDR_TYPE_DIST:
		return rv_set_dist(vm, value);
	case KVM_VGIC_V3_ADDR_TYPE_REDIST:
		return rv_set_redist(vm, value, 0);
	case KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION:
		return rv_set_region(vm, value);
	default:
		return -ENXIO;
	}
}

static int rv_get_address(const struct rv_vgic *vgic, u64 attr, u64 *value)
{
	switch (attr) {
	case KVM_VGIC_V3_ADDR_TYPE_DIST:
		*value = vgic->has_dist ? vgic->dist : U64_MAX;
		return 0;
	case KVM_VGIC_V3_ADDR_TYPE_REDIST:
		*value = vgic->has_redist ? vgic->redist : U64_MAX;
		return 0;
	case KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION:
		return rv_get_region(vgic, value);
	default:
		return -ENXIO;
	}
}

static int rv_set_intids(struct rv_vgic *vgic, u32 count)
{
	if (count < RV_MIN_INTIDS || count > RV_NR_INTIDS || count % 32)
		return -EINVAL;
	if (vgic->nr_intids)
		return -EBUSY;
	WRITE_ONCE(vgic->nr_intids, count);
	return 0;
}

static int rv_vgic_make_ready(struct rv_vm *vm)
{
	struct rv_vgic *vgic = &vm->vgic;

	if (vgic->ready)
		return 0;
	if (xa_empty(&vm->vcpus))
		return -ENODEV;
	if (!vgic->nr_intids)
		WRITE_ONCE(vgic->nr_intids, RV_NR_INTIDS);
	/* Pairs with the acquire in rv_vgic_ready(). */
	smp_store_release(&vgic->ready, true);
	return 0;
}

static int rv_vgic_has_attr(const struct kvm_device_attr *attr)
{
	switch (attr->group) {
	case KVM_DEV_ARM_VGIC_GRP_ADDR:
		switch (attr->attr) {
		case KVM_VGIC_V3_ADDR_TYPE_DIST:
		case KVM_VGIC_V3_ADDR_TYPE_REDIST:
		case KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION:
			return 0;
		}
		break;
	case KVM_DEV_ARM_VGIC_GRP_NR_IRQS:
		return 0;
	case KVM_DEV_ARM_VGIC_GRP_CTRL:
		if (attr->attr == KVM_DEV_ARM_VGIC_CTRL_INIT)
			return 0;
		break;
	}
	return -ENXIO;
}

static int rv_vgic_set_attr(struct rv_vm *vm, const struct kvm_device_attr *attr)
{
	void __user *data = u64_to_user_ptr(attr->addr);
	u64 value = 0;
	u32 count = 0;
	int ret;

	ret = rv_vgic_has_attr(attr);
	if (ret)
		return ret;
	if (attr->group == KVM_DEV_ARM_VGIC_GRP_ADDR &&
	    copy_from_user(&value, data, sizeof(value)))
		return -EFAULT;
	if (attr->group == KVM_DEV_ARM_VGIC_GRP_NR_IRQS &&
	    copy_from_user(&count, data, sizeof(count)))
		return -EFAULT;

	mutex_lock(&vm->lock);
	switch (attr->group) {
	case KVM_DEV_ARM_VGIC_GRP_ADDR:
		ret = rv_set_address(vm, attr->attr, value);
		break;
	case KVM_DEV_ARM_VGIC_GRP_NR_IRQS:
		ret = rv_set_intids(&vm->vgic, count);
		break;
	default:
		ret = rv_vgic_make_ready(vm);
		break;
	}
	mutex_unlock(&vm->lock);
	return ret;
}

static int rv_vgic_get_attr(struct rv_vm *vm, const struct kvm_device_attr *attr)
{
	void __user *data = u64_to_user_ptr(attr->addr);
	u64 value;
	int ret;

	switch (attr->group) {
	case KVM_DEV_ARM_VGIC_GRP_ADDR:
		if (copy_from_user(&value, data, sizeof(value)))
			return -EFAULT;
		mutex_lock(&vm->lock);
		ret = rv_get_address(&vm->vgic, attr->attr, &value);
		mutex_unlock(&vm->lock);
		if (ret)
			return ret;
		return copy_to_user(data, &value, sizeof(value)) ? -EFAULT : 0;
	case KVM_DEV_ARM_VGIC_GRP_NR_IRQS:
		return put_user(READ_ONCE(vm->vgic.nr_intids) ?: RV_FIRST_SPI,
				(u32 __user *)data);
	default:
		return -ENXIO;
	}
}

static long rv_vgic_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct rv_vm *vm = file->private_data;
	struct kvm_device_attr attr;

	if (vm->mm != current->mm || READ_ONCE(vm->phase) == RV_DEAD)
		return -EIO;
	if (cmd != KVM_HAS_DEVICE_ATTR && cmd != KVM_SET_DEVICE_ATTR &&
	    cmd != KVM_GET_DEVICE_ATTR)
		return -ENOTTY;
	if (copy_from_user(&attr, (void __user *)arg, sizeof(attr)))
		return -EFAULT;

	switch (cmd) {
	case KVM_HAS_DEVICE_ATTR:
		return rv_vgic_has_attr(&attr);
	case KVM_SET_DEVICE_ATTR:
		return rv_vgic_set_attr(vm, &attr);
	default:
		return rv_vgic_get_attr(vm, &attr);
	}
}

static int rv_vgic_release(struct inode *inode, struct file *file)
{
	rv_vm_put(file->private_data);
	return 0;
}

static const struct file_operations rv_vgic_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = rv_vgic_ioctl,
	.release = rv_vgic_release,
	.llseek = noop_llseek,
};

int rv_vgic_create(struct rv_vm *vm, struct kvm_create_device *args)
{
	int ret;

	if (args->type != KVM_DEV_TYPE_ARM_VGIC_V3)
		return -ENODEV;
	if (args->flags & KVM_CREATE_DEVICE_TEST)
		return 0;

	mutex_lock(&vm->lock);
	if (vm->vgic.created) {
		ret = -EEXIST;
	} else if (vm->phase != RV_NEW) {
		ret = -EBUSY;
	} else {
		rv_vm_get(vm);
		ret = anon_inode_getfd("kvm-arm-vgic-v3", &rv_vgic_fops, vm,
				       O_RDWR | O_CLOEXEC);
		if (ret < 0)
			rv_vm_put(vm);
		else
			WRITE_ONCE(vm->vgic.created, true);
	}
	mutex_unlock(&vm->lock);
	if (ret < 0)
		return ret;
	args->fd = ret;
	return 0;
}

int rv_vgic_addresses(struct rv_vm *vm, u64 *dist, u64 *redist)
{
	const struct rv_vgic *vgic = &vm->vgic;
	int ret;

	if (!vgic->created) {
		*redist = rv_address_space(vm) - rv_redist_size(vm);
		*dist = *redist - KVM_VGIC_V3_DIST_SIZE;
		return 0;
	}
	if (!vgic->has_dist || !vgic->has_redist ||
	    (vgic->redists && vgic->redists < rv_redists(vm)))
		return -ENXIO;
	ret = rv_check_frames(vm);
	if (ret)
		return ret;
	if (!vgic->ready)
		return -EBUSY;
	*dist = vgic->dist;
	*redist = vgic->redist;
	return 0;
}
