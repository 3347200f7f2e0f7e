// SPDX-License-Identifier: GPL-2.0-only
/*
 * VMs: life cycle, and the pages that the hypervisor holds for them. The ioctls are in
 * vm_ioctl.c.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/anon_inodes.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/gfp.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "ravelin_kvm.h"

#define RV_DEFAULT_IPA_BITS	40
#define RV_MIN_IPA_BITS		32
#define RV_MAX_IPA_BITS		48
#define RV_BUSY_TRIES		1000

u8 rv_max_ipa_bits;

/*
 * VMs that the hypervisor has something of. There are no new ones when the machine is about to
 * be another kernel's.
 */
static LIST_HEAD(rv_created);
static bool rv_closed;
static DEFINE_MUTEX(rv_created_lock);

bool rv_vms_exist(void)
{
	return !list_empty_careful(&rv_created);
}

static u64 rv_vm_attributes(enum rv_kind kind, u8 ipa_bits, u32 vcpus)
{
	static const u64 kinds[] = {
		[RV_ORDINARY] = RAVELIN_VM_ORDINARY,
		[RV_PKVM] = RAVELIN_VM_PKVM,
		[RV_REALM] = RAVELIN_VM_REALM,
	};

	return kinds[kind] | (u64)ipa_bits << RAVELIN_VM_IPA_BITS_SHIFT |
	       (u64)vcpus << RAVELIN_VM_VCPUS_SHIFT;
}

/* How long guest addresses may be, and which registers there are, depends on the CPU. */
int rv_vm_setup(void)
{
	u8 bits;

	for (bits = RV_MAX_IPA_BITS; bits >= RV_MIN_IPA_BITS; bits--) {
		u64 attributes = rv_vm_attributes(RV_ORDINARY, bits, 1);

		if (!rv_hyp(RAVELIN_CALL_VM_SIZES, NULL, attributes)) {
			rv_max_ipa_bits = bits;
			rv_sysregs_setup(attributes);
			return 0;
		}
	}
	return -ENODEV;
}

/*
 * Contiguous pages, each with its own reference count, for they come back one by one. NULL if
 * there is no memory.
 */
static struct page *rv_alloc_pages(u64 pages, u64 align)
{
	unsigned int order, i;
	struct page *page;

	if (!pages || pages > RAVELIN_VM_CREATE_MAX_PAGES || align > RAVELIN_VM_CREATE_MAX_PAGES)
		return NULL;
	order = order_base_2(max(pages, align));
	page = alloc_pages(GFP_KERNEL_ACCOUNT, order);
	if (!page)
		return NULL;
	split_page(page, order);
	for (i = pages; i < 1U << order; i++)
		__free_page(page + i);
	return page;
}

static void rv_free_pages(struct page *page, u64 pages)
{
	u64 i;

	for (i = 0; i < pages; i++)
		__free_page(page + i);
}

/*
 * The hypervisor has taken the pages. They come back when the VM is destroyed. Who looks into all
 * memory, such as a crash dump, leaves them alone.
 */
static void rv_vm_track(struct rv_vm *vm, struct page *page, u64 pages)
{
	u64 i;

	mutex_lock(&vm->donated_lock);
	for (i = 0; i < pages; i++) {
		__SetPageOffline(page + i);
		list_add(&page[i].lru, &vm->donated);
	}
	mutex_unlock(&vm->donated_lock);
}

int rv_vm_donate_tables(struct rv_vm *vm, u64 pages)
{
	struct page *page;
	long status;

	for (; pages; pages--) {
		page = rv_alloc_pages(1, 1);
		if (!page)
			return -ENOMEM;
		status = rv_hyp(RAVELIN_CALL_VM_DONATE_TABLES, NULL, vm->handle,
				page_to_phys(page), 1);
		if (status) {
			rv_free_pages(page, 1);
			return rv_errno(status);
		}
		rv_vm_track(vm, page, 1);
		cond_resched();
	}
	return 0;
}

long __rv_vm_hyp(struct rv_vm *vm, u32 fn, struct rv_result *result, u64 a2, u64 a3, u64 a4)
{
	struct rv_result ours;
	int tries = 0;
	long status;

	if (!result)
		result = &ours;
	for (;;) {
		status = rv_hyp(fn, result, vm->handle, a2, a3, a4);
		switch (status) {
		case RAVELIN_STATUS_NEEDS_TABLES:
			if (rv_vm_donate_tables(vm, result->x1))
				return status;
			break;
		case RAVELIN_STATUS_BUSY:
			if (++tries == RV_BUSY_TRIES)
				return status;
			usleep_range(20, 100);
			break;
		default:
			return status;
		}
		cond_resched();
	}
}

static int rv_el2_create(struct rv_vm *vm, u64 *vcpu_pages)
{
	struct rv_result sizes, result;
	struct rv_vcpu *vcpu;
	unsigned long id;
	u64 attributes;
	struct page *page;
	u32 vcpus = 0;
	long status;

	xa_for_each(&vm->vcpus, id, vcpu)
		vcpus = id + 1;
	attributes = rv_vm_attributes(vm->kind, vm->ipa_bits, vcpus);
	status = rv_hyp(RAVELIN_CALL_VM_SIZES, &sizes, attributes);
	if (status)
		return rv_errno(status);

	page = rv_alloc_pages(sizes.x1, sizes.x3);
	if (!page)
		return -ENOMEM;
	mutex_lock(&rv_created_lock);
	status = RAVELIN_STATUS_BUSY;
	if (!rv_closed)
		status = rv_hyp(RAVELIN_CALL_VM_CREATE, &result, attributes, page_to_phys(page),
				sizes.x1);
	if (!status) {
		vm->handle = result.x1;
		vm->created = true;
		list_add(&vm->created_link, &rv_created);
	}
	mutex_unlock(&rv_created_lock);
	if (status) {
		rv_free_pages(page, sizes.x1);
		return rv_errno(status);
	}
	rv_vm_track(vm, page, sizes.x1);
	*vcpu_pages = sizes.x2;
	return 0;
}

static int rv_el2_create_vcpu(struct rv_vm *vm, struct rv_vcpu *vcpu, u64 pages)
{
	struct page *page;
	long status;

	page = rv_alloc_pages(pages, 1);
	if (!page)
		return -ENOMEM;
	status = rv_hyp(RAVELIN_CALL_VCPU_CREATE, NULL, vm->handle, vcpu->id,
			page_to_phys(page), pages, virt_to_phys(vcpu->el2));
	if (status) {
		rv_free_pages(page, pages);
		return rv_errno(status);
	}
	rv_vm_track(vm, page, pages);
	return 0;
}

/*
 * Makes sure that a protected guest can have what its slots hold, while nothing is lost if it
 * cannot.
 */
static int rv_vm_prepare(struct rv_vm *vm)
{
	struct rv_slot *slot;
	unsigned long id;
	int ret;

	if (vm->kind == RV_ORDINARY)
		return 0;
	xa_for_each(&vm->slots, id, slot) {
		ret = rv_gmem_prepare(slot);
		if (ret)
			return ret;
	}
	return 0;
}

/* Gives a protected guest what its slots hold, in ascending order, for it is measured. */
static int rv_el2_populate(struct rv_vm *vm)
{
	struct rv_slot *slot;
	unsigned long gfn = 0;
	int ret;

	if (vm->kind == RV_ORDINARY)
		return 0;
	mt_for_each(&vm->slot_tree, slot, gfn, ULONG_MAX) {
		ret = rv_gmem_populate(slot);
		if (ret)
			return ret;
	}
	return 0;
}

static int rv_el2_seal(struct rv_vm *vm, struct rv_vcpu *boot)
{
	u64 dist, redist;
	int tries = 0;
	long status;
	int ret;

	ret = rv_vgic_addresses(vm, &dist, &redist);
	if (ret)
		return ret;
	for (;;) {
		status = rv_hyp(RAVELIN_CALL_VM_SEAL, NULL, vm->handle, rv_regs_pc(boot),
				rv_regs_x0(boot), dist, redist);
		/* Another thread may be asking for a page that it has just lost to the guest. */
		if (status != RAVELIN_STATUS_BUSY || ++tries == RV_BUSY_TRIES)
			break;
		usleep_range(20, 100);
	}
	return rv_errno(status);
}

/*
 * Ends the VM at EL2: no vCPU runs afterwards, and none can. Waits for those that do.
 */
static long rv_el2_teardown(struct rv_vm *vm)
{
	long status;

	rv_irq_stop(vm);
	for (;;) {
		rv_vm_wake_all(vm);
		status = rv_hyp(RAVELIN_CALL_VM_TEARDOWN, NULL, vm->handle);
		if (status != RAVELIN_STATUS_BUSY)
			return status;
		usleep_range(20, 100);
	}
}

/* Takes back everything that the hypervisor has of the VM, which is torn down. */
static void rv_el2_destroy(struct rv_vm *vm)
{
	struct page *page, *next;
	struct rv_result result;
	struct rv_slot *slot;
	unsigned long id;
	long status;

	xa_for_each(&vm->slots, id, slot) {
		if (rv_slot_is_anon(slot))
			rv_anon_reclaim(slot);
		else if (slot->gmem)
			rv_gmem_reclaim(slot);
	}

	do {
		status = rv_vm_hyp(vm, RAVELIN_CALL_VM_DESTROY, &result);
		cond_resched();
	} while (!status && result.x1);

	list_for_each_entry_safe(page, next, &vm->donated, lru) {
		list_del(&page->lru);
		/* Pages that the hypervisor keeps must never be used again. */
		if (!status) {
			__ClearPageOffline(page);
			__free_page(page);
		}
	}
	if (WARN_ON_ONCE(status)) {
		pr_err("VM %llu cannot be destroyed: %ld\n", vm->handle, status);
		WRITE_ONCE(vm->unreturned, true);
		return;
	}
	mutex_lock(&rv_created_lock);
	vm->created = false;
	list_del(&vm->created_link);
	mutex_unlock(&rv_created_lock);
}

int rv_vm_finalize(struct rv_vm *vm)
{
	struct rv_vcpu *vcpu, *boot;
	unsigned long id;
	u64 vcpu_pages;
	int ret;

	if (mutex_lock_killable(&vm->lock))
		return -EINTR;
	if (vm->phase != RV_NEW) {
		ret = vm->phase == RV_LIVE ? 0 : -EIO;
		goto unlock;
	}

	/* EL2 starts vCPU 0, the guest the others. */
	ret = -EINVAL;
	boot = xa_load(&vm->vcpus, 0);
	xa_for_each(&vm->vcpus, id, vcpu) {
		bool starts_on = vcpu == boot;

		if (vcpu->initialized && vcpu->starts_off == starts_on)
			goto unlock;
	}
	if (!boot || !boot->initialized)
		goto unlock;

	down_write(&vm->slots_lock);
	ret = rv_vm_prepare(vm);
	if (ret)
		goto unlock_slots;
	ret = rv_el2_create(vm, &vcpu_pages);
	if (ret)
		goto unlock_slots;
	xa_for_each(&vm->vcpus, id, vcpu) {
		ret = rv_el2_create_vcpu(vm, vcpu, vcpu_pages);
		if (ret)
			goto destroy;
		memset(vcpu->el2 + RAVELIN_RUN_ENTRY, 0, sizeof(struct ravelin_run_entry));
	}
	ret = rv_el2_populate(vm);
	if (ret)
		goto destroy;
	ret = rv_el2_seal(vm, boot);
	if (ret)
		goto destroy;
	xa_for_each(&vm->vcpus, id, vcpu) {
		ret = rv_regs_load(vcpu);
		if (ret)
			goto destroy;
	}

	WRITE_ONCE(vm->phase, RV_LIVE);
	up_write(&vm->slots_lock);
	rv_vgic_replay(vm);
	rv_vm_wake_all(vm);
	mutex_unlock(&vm->lock);
	return 0;

destroy:
	rv_el2_teardown(vm);
	rv_el2_destroy(vm);
	if (vm->created) {
		WRITE_ONCE(vm->phase, RV_DEAD);
		rv_vm_wake_all(vm);
	}
unlock_slots:
	up_write(&vm->slots_lock);
unlock:
	mutex_unlock(&vm->lock);
	return ret;
}

int rv_vm_reset(struct rv_vm *vm)
{
	struct rv_vcpu *vcpu;
	unsigned long id;
	int ret = 0;

	mutex_lock(&vm->lock);
	if (vm->phase == RV_NEW)
		goto unlock;
	ret = vm->phase == RV_DEAD ? -EIO : -EPERM;
	if (vm->phase == RV_DEAD || vm->kind != RV_ORDINARY)
		goto unlock;

	down_write(&vm->slots_lock);
	WRITE_ONCE(vm->stopping, true);
	rv_el2_teardown(vm);
	rv_el2_destroy(vm);
	ret = vm->created ? -EIO : 0;
	WRITE_ONCE(vm->phase, ret ? RV_DEAD : RV_NEW);
	WRITE_ONCE(vm->ended, 0);
	xa_for_each(&vm->vcpus, id, vcpu)
		WRITE_ONCE(vcpu->failed, false);
	WRITE_ONCE(vm->stopping, false);
	up_write(&vm->slots_lock);
	rv_vm_wake_all(vm);
unlock:
	mutex_unlock(&vm->lock);
	return ret;
}

void rv_vm_kill(struct rv_vm *vm)
{
	struct rv_slot *slot;
	unsigned long id;

	mutex_lock(&vm->lock);
	if (vm->phase != RV_DEAD) {
		down_write(&vm->slots_lock);
		WRITE_ONCE(vm->phase, RV_DEAD);
		if (vm->created) {
			rv_el2_teardown(vm);
			xa_for_each(&vm->slots, id, slot) {
				if (rv_slot_is_anon(slot))
					rv_anon_reclaim(slot);
			}
		}
		up_write(&vm->slots_lock);
		rv_vm_wake_all(vm);
	}
	mutex_unlock(&vm->lock);
}

static void rv_vm_free(struct rv_vm *vm)
{
	struct rv_vcpu *vcpu;
	unsigned long id;

	/* Interrupts wake vCPUs. */
	rv_irq_release(vm);
	xa_for_each(&vm->vcpus, id, vcpu)
		rv_vcpu_free(vcpu);
	xa_destroy(&vm->vcpus);
	mmdrop(vm->mm);
	kfree(vm);
}

/* Ends the VM, and takes back all that the hypervisor has of it. */
static void rv_vm_end(struct rv_vm *vm)
{
	rv_vm_kill(vm);
	down_write(&vm->slots_lock);
	if (vm->created)
		rv_el2_destroy(vm);
	up_write(&vm->slots_lock);
}

/*
 * Returns a VM that the hypervisor has something of, with a reference; or NULL, and in @wait
 * whether there are some whose last reference is just going, so that they end by themselves.
 */
static struct rv_vm *rv_vms_next(bool *wait)
{
	struct rv_vm *vm;

	*wait = false;
	guard(mutex)(&rv_created_lock);
	rv_closed = true;
	list_for_each_entry(vm, &rv_created, created_link) {
		if (READ_ONCE(vm->unreturned))
			continue;
		if (kref_get_unless_zero(&vm->refs))
			return vm;
		*wait = true;
	}
	return NULL;
}

void rv_vms_end(void)
{
	struct rv_vm *vm;
	bool wait;

	for (;;) {
		vm = rv_vms_next(&wait);
		if (vm) {
			rv_vm_end(vm);
			rv_vm_put(vm);
		} else if (wait) {
			usleep_range(100, 1000);
		} else {
			return;
		}
	}
}

static void rv_vm_release(struct kref *refs)
{
	struct rv_vm *vm = container_of(refs, struct rv_vm, refs);

	/* Nobody else knows the VM any more, but slots that watch the process's memory. */
	rv_vm_end(vm);
	down_write(&vm->slots_lock);
	rv_slots_release(vm);
	up_write(&vm->slots_lock);
	if (!vm->created)
		rv_vm_free(vm);
}

struct rv_vm *rv_vm_get(struct rv_vm *vm)
{
	kref_get(&vm->refs);
	return vm;
}

void rv_vm_put(struct rv_vm *vm)
{
	kref_put(&vm->refs, rv_vm_release);
}

int rv_vm_check_mm(struct rv_vm *vm)
{
	return current->mm == vm->mm ? 0 : -EIO;
}

static int rv_vm_parse_type(struct rv_vm *vm, unsigned long type)
{
	u8 bits = type & KVM_VM_TYPE_ARM_IPA_SIZE_MASK;

	switch (type & ~KVM_VM_TYPE_ARM_IPA_SIZE_MASK) {
	case 0:
		vm->kind = RV_ORDINARY;
		break;
	case KVM_VM_TYPE_ARM_PROTECTED:
		vm->kind = RV_PKVM;
		break;
	case KVM_VM_TYPE_ARM_REALM:
		vm->kind = RV_REALM;
		break;
	default:
		return -EINVAL;
	}

	vm->ipa_bits = bits ?: RV_DEFAULT_IPA_BITS;
	if (vm->ipa_bits < RV_MIN_IPA_BITS || vm->ipa_bits > rv_max_ipa_bits)
		return -EINVAL;
	return 0;
}

static struct rv_vm *rv_vm_alloc(unsigned long type)
{
	struct rv_vm *vm;
	int ret;

	vm = kzalloc_obj(*vm, GFP_KERNEL_ACCOUNT);
	if (!vm)
		return ERR_PTR(-ENOMEM);
	ret = rv_vm_parse_type(vm, type);
	if (ret)
		goto free;

	kref_init(&vm->refs);
	mutex_init(&vm->lock);
	init_rwsem(&vm->slots_lock);
	xa_init(&vm->slots);
	mt_init(&vm->slot_tree);
	xa_init(&vm->vcpus);
	mutex_init(&vm->donated_lock);
	INIT_LIST_HEAD(&vm->donated);
	ret = rv_irq_init(vm);
	if (ret)
		goto free;
	mmgrab(current->mm);
	vm->mm = current->mm;
	return vm;

free:
	kfree(vm);
	return ERR_PTR(ret);
}

int rv_vm_create(unsigned long type)
{
	struct rv_vm *vm = rv_vm_alloc(type);
	int ret;

	if (IS_ERR(vm))
		return PTR_ERR(vm);
	ret = anon_inode_getfd("kvm-vm", &rv_vm_fops, vm, O_RDWR | O_CLOEXEC);
	if (ret < 0)
		rv_vm_put(vm);
	return ret;
}
