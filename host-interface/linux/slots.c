// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory slots: which guest addresses have memory, and whose.
 */

#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "ravelin_kvm.h"

#define RV_SLOT_FLAGS		KVM_MEM_GUEST_MEMFD
#define RV_MAX_SLOT_PAGES	(BIT_ULL(31) - 1)

/* What a slot's number and size have to be, whatever else there is. */
static int rv_check_region(struct rv_vm *vm, const struct kvm_userspace_memory_region2 *region)
{
	/* The shared alias of a realm's memory has no slots. */
	u8 bits = vm->kind == RV_REALM ? vm->ipa_bits - 1 : vm->ipa_bits;
	u64 hva = region->userspace_addr;
	u64 end;

	if (region->flags & ~RV_SLOT_FLAGS || region->slot >= RV_MAX_SLOTS)
		return -EINVAL;
	if (!PAGE_ALIGNED(region->guest_phys_addr) || !PAGE_ALIGNED(region->memory_size))
		return -EINVAL;
	if (!PAGE_ALIGNED(hva) || hva != untagged_addr(hva) ||
	    !access_ok((void __user *)hva, region->memory_size))
		return -EINVAL;
	if (region->flags & KVM_MEM_GUEST_MEMFD &&
	    (!PAGE_ALIGNED(region->guest_memfd_offset) ||
	     region->guest_memfd_offset + region->memory_size < region->guest_memfd_offset))
		return -EINVAL;
	if (check_add_overflow(region->guest_phys_addr, region->memory_size, &end))
		return -EINVAL;
	if (region->memory_size >> PAGE_SHIFT > RV_MAX_SLOT_PAGES)
		return -EINVAL;
	return end > BIT_ULL(bits) ? -EFAULT : 0;
}

static void rv_slot_free(struct rv_slot *slot)
{
	if (rv_slot_is_anon(slot))
		rv_anon_unbind(slot);
	else if (slot->gmem)
		rv_gmem_unbind(slot);
	kfree(slot);
}

static unsigned long rv_first_gfn(const struct rv_slot *slot)
{
	return slot->gpa >> PAGE_SHIFT;
}

static unsigned long rv_last_gfn(const struct rv_slot *slot)
{
	return (slot->gpa + slot->size - 1) >> PAGE_SHIFT;
}

static void rv_slot_remove(struct rv_slot *slot)
{
	struct rv_vm *vm = slot->vm;

	xa_erase(&vm->slots, slot->id);
	mtree_erase(&vm->slot_tree, rv_first_gfn(slot));
	rv_slot_free(slot);
}

/* Whether another slot than @old has an address of @slot's. */
static bool rv_slot_overlaps(const struct rv_slot *slot, const struct rv_slot *old)
{
	unsigned long gfn = rv_first_gfn(slot);
	struct rv_slot *other;

	mt_for_each(&slot->vm->slot_tree, other, gfn, rv_last_gfn(slot)) {
		if (other != old)
			return true;
	}
	return false;
}

static int rv_slot_bind(struct rv_slot *slot, const struct kvm_userspace_memory_region2 *region)
{
	if (rv_slot_is_anon(slot))
		return rv_anon_bind(slot);
	return rv_gmem_bind(slot, region->guest_memfd, region->guest_memfd_offset);
}

static int rv_slot_insert(struct rv_slot *slot)
{
	struct rv_vm *vm = slot->vm;
	int ret;

	ret = mtree_insert_range(&vm->slot_tree, rv_first_gfn(slot), rv_last_gfn(slot), slot,
				 GFP_KERNEL_ACCOUNT);
	if (ret)
		return ret;
	ret = xa_err(xa_store(&vm->slots, slot->id, slot, GFP_KERNEL_ACCOUNT));
	if (ret)
		mtree_erase(&vm->slot_tree, rv_first_gfn(slot));
	return ret;
}

/* Checks a change of a slot that exists. Says in @same whether there is nothing to do. */
static int rv_check_change(const struct rv_slot *old,
			   const struct kvm_userspace_memory_region2 *region, bool *same)
{
	if (old->flags & KVM_MEM_GUEST_MEMFD)
		return -EINVAL;
	if (region->memory_size != old->size || region->userspace_addr != old->hva ||
	    region->flags != old->flags)
		return -EINVAL;
	*same = region->guest_phys_addr == old->gpa;
	return 0;
}

int rv_set_memory_region(struct rv_vm *vm, const struct kvm_userspace_memory_region2 *region)
{
	struct rv_slot *old, *slot;
	bool same = false;
	int ret;

	ret = rv_check_region(vm, region);
	if (ret)
		return ret;

	old = xa_load(&vm->slots, region->slot);
	if (!region->memory_size && !old)
		return -EINVAL;
	if (old && region->memory_size) {
		ret = rv_check_change(old, region, &same);
		if (ret || same)
			return ret;
	}
	if (old && vm->kind != RV_ORDINARY && vm->phase == RV_LIVE)
		return -EPERM;
	if (!region->memory_size) {
		rv_slot_remove(old);
		return 0;
	}
	if (vm->kind != RV_ORDINARY && !(region->flags & KVM_MEM_GUEST_MEMFD))
		return -EINVAL;

	slot = kzalloc_obj(*slot, GFP_KERNEL_ACCOUNT);
	if (!slot)
		return -ENOMEM;
	slot->vm = vm;
	slot->id = region->slot;
	slot->flags = region->flags;
	slot->gpa = region->guest_phys_addr;
	slot->size = region->memory_size;
	slot->hva = region->userspace_addr;
	ret = -EEXIST;
	if (rv_slot_overlaps(slot, old))
		goto free;
	ret = rv_slot_bind(slot, region);
	if (ret)
		goto free;
	/* From here on the old one is gone, even if there is no memory for the new one. */
	if (old)
		rv_slot_remove(old);
	ret = rv_slot_insert(slot);
	if (ret)
		rv_slot_free(slot);
	return ret;

free:
	kfree(slot);
	return ret;
}

struct rv_slot *rv_slot_find(struct rv_vm *vm, u64 gpa)
{
	return mtree_load(&vm->slot_tree, gpa >> PAGE_SHIFT);
}

int rv_slot_fault(struct rv_slot *slot, u64 gpa)
{
	if (rv_slot_is_anon(slot))
		return rv_anon_fault(slot, gpa);
	return slot->gmem ? rv_gmem_fault(slot, gpa >> PAGE_SHIFT) : -EFAULT;
}

void rv_slots_release(struct rv_vm *vm)
{
	struct rv_slot *slot;
	unsigned long id;

	xa_for_each(&vm->slots, id, slot)
		rv_slot_remove(slot);
	xa_destroy(&vm->slots);
	mtree_destroy(&vm->slot_tree);
}
