// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd: who may touch what no guest has, by KVM_SET_MEMORY_ATTRIBUTES2 on the file.
 *
 * Of pages that a guest has, the guest decides; the host can take up what is offered, and let go
 * of it.
 */
#include <linux/jiffies.h>
#include <linux/maple_tree.h>
#include <linux/overflow.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "gmem.h"
#include "ravelin_kvm.h"

bool rv_gmem_host_may(struct rv_gmem *gmem, pgoff_t index)
{
	void *attributes = mtree_empty(&gmem->attributes) ?
				   NULL : mtree_load(&gmem->attributes, index);

	if (!attributes)
		return gmem->flags & GUEST_MEMFD_FLAG_INIT_SHARED;
	return !(xa_to_value(attributes) & KVM_MEMORY_ATTRIBUTE_PRIVATE);
}

/* Claims what a guest has in a range. */
static int rv_gmem_make_shared(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, pgoff_t *error)
{
	pgoff_t index = first;

	for (; rv_gmem_find(gmem, &index, last, RV_GMEM_GIVEN); index++) {
		if (!rv_gmem_is(gmem, index, RV_GMEM_CLAIMED) &&
		    rv_gmem_claim(gmem, index, last)) {
			*error = index;
			return -EPERM;
		}
		cond_resched();
	}
	return 0;
}

static int rv_gmem_make_private(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, pgoff_t *error)
{
	int err;

	err = rv_gmem_isolate(gmem, first, last, RV_GMEM_TOUCHED, error);
	if (err)
		return err;
	return rv_gmem_unclaim(gmem, first, last, error);
}

static int rv_gmem_set_attributes(struct rv_gmem *gmem, pgoff_t first, pgoff_t last,
				  u64 attributes, pgoff_t *error)
{
	int err;

	if (attributes)
		err = rv_gmem_make_private(gmem, first, last, error);
	else
		err = rv_gmem_make_shared(gmem, first, last, error);
	if (err)
		return err;
	return mtree_store_range(&gmem->attributes, first, last, xa_mk_value(attributes),
				 GFP_KERNEL_ACCOUNT);
}

static int rv_gmem_check_attributes(struct rv_gmem *gmem, const struct kvm_memory_attributes2 *args)
{
	u64 end;

	if (gmem->vm->kind == RV_ORDINARY || args->flags ||
	    memchr_inv(args->reserved, 0, sizeof(args->reserved)) ||
	    args->attributes & ~(u64)KVM_MEMORY_ATTRIBUTE_PRIVATE)
		return -EINVAL;
	if (!args->size || !PAGE_ALIGNED(args->offset) || !PAGE_ALIGNED(args->size) ||
	    check_add_overflow(args->offset, args->size, &end) || end >> PAGE_SHIFT > gmem->nr)
		return -EINVAL;
	return 0;
}

static long rv_gmem_set_attributes_ioctl(struct rv_gmem *gmem,
					 struct kvm_memory_attributes2 __user *user)
{
	unsigned long deadline = jiffies + RV_GMEM_PATIENCE;
	struct kvm_memory_attributes2 args;
	pgoff_t first, last, error;
	int err;

	if (copy_from_user(&args, user, sizeof(args)))
		return -EFAULT;
	err = rv_gmem_check_attributes(gmem, &args);
	if (err)
		return err;
	first = args.offset >> PAGE_SHIFT;
	last = first + (args.size >> PAGE_SHIFT) - 1;
	/* For failures that are no page's: the VM may be at its end. */
	error = first;
	do {
		down_write(&gmem->lock);
		err = rv_gmem_set_attributes(gmem, first, last, args.attributes, &error);
		up_write(&gmem->lock);
	} while (err == -EAGAIN && rv_gmem_wait(deadline));

	if ((err == -EAGAIN || err == -EPERM) &&
	    put_user((u64)error << PAGE_SHIFT, &user->error_offset))
		return -EFAULT;
	return err;
}

long rv_gmem_ioctl(struct file *file, unsigned int ioctl, unsigned long arg)
{
	if (ioctl != KVM_SET_MEMORY_ATTRIBUTES2)
		return -ENOTTY;
	return rv_gmem_set_attributes_ioctl(file->private_data, (void __user *)arg);
}
