// SPDX-License-Identifier: GPL-2.0-only
/*
 * Why a vCPU has left the guest, and what is done about it.
 */

#include <linux/string.h>

#include "ravelin_kvm.h"

/* What a realm's RSI_HOST_CALL is to userspace (Arm DEN0137). */
#define RV_SMC_RSI_HOST_CALL	0xc4000199
/* In a conversion that userspace is told of: the guest takes the pages back. */
#define RV_MAP_GPA_PRIVATE	BIT(4)

static const struct ravelin_run_exit *rv_exit(struct rv_vcpu *vcpu)
{
	return vcpu->el2 + RAVELIN_RUN_EXIT;
}

static void rv_answer(struct rv_vcpu *vcpu, u64 answer, u64 value)
{
	struct ravelin_run_entry *entry = vcpu->el2 + RAVELIN_RUN_ENTRY;

	entry->answer = answer;
	entry->value = value;
}

/* The guest address without the bit that says that a realm means the shared alias. */
static u64 rv_exit_gpa(struct rv_vcpu *vcpu, bool *shared)
{
	u64 bit = vcpu->vm->kind == RV_REALM ? BIT_ULL(vcpu->vm->ipa_bits - 1) : 0;
	u64 address = rv_exit(vcpu)->address;

	if (shared)
		*shared = address & bit;
	return address & ~bit;
}

/* Userspace learns which page could not be had. */
static int rv_memory_fault(struct rv_vcpu *vcpu, u64 gpa, int error)
{
	struct kvm_run *run = vcpu->run;

	switch (error) {
	case -EINTR:
	case -ENOMEM:
		return error;
	case -EAGAIN:
	case -EHWPOISON:
		break;
	default:
		error = -EFAULT;
	}
	run->exit_reason = KVM_EXIT_MEMORY_FAULT;
	run->memory_fault.flags =
		vcpu->vm->kind == RV_ORDINARY ? 0 : KVM_MEMORY_EXIT_FLAG_PRIVATE;
	run->memory_fault.gpa = gpa & PAGE_MASK;
	run->memory_fault.size = PAGE_SIZE;
	return error;
}

/*
 * The guest wants memory. -ENXIO if there is no slot.
 */
static int rv_fault_in(struct rv_vcpu *vcpu, u64 gpa)
{
	struct rv_vm *vm = vcpu->vm;
	struct rv_slot *slot;
	int ret = -ENXIO;

	if (down_read_killable(&vm->slots_lock))
		return -EINTR;
	slot = rv_slot_find(vm, gpa);
	/* A VM that is torn down or made anew takes nothing. */
	if (slot)
		ret = vm->phase == RV_LIVE ? rv_slot_fault(slot, gpa) : 0;
	up_read(&vm->slots_lock);
	return ret;
}

static int rv_handle_fault(struct rv_vcpu *vcpu)
{
	u64 gpa = rv_exit_gpa(vcpu, NULL);
	int ret;

	ret = rv_fault_in(vcpu, gpa);
	if (!ret)
		return 1;
	if (ret == -ENXIO && vcpu->vm->kind == RV_ORDINARY) {
		/*
		 * Code, or an access that is too complicated for a device, where there is
		 * nothing.
		 */
		rv_answer(vcpu, RAVELIN_ANSWER_ABORT, 0);
		return 1;
	}
	return rv_memory_fault(vcpu, gpa, ret);
}

static int rv_handle_mmio(struct rv_vcpu *vcpu)
{
	const struct ravelin_run_exit *exit = rv_exit(vcpu);
	bool write = exit->flags & RAVELIN_RUN_FLAG_WRITE;
	struct kvm_run *run = vcpu->run;
	bool shared;
	u64 gpa = rv_exit_gpa(vcpu, &shared);
	int ret;

	/*
	 * Most guests do not say where devices are, so this may be memory that is not there yet.
	 * A realm does; in its case the memory is its own, which it has not shared.
	 */
	if (shared) {
		down_read(&vcpu->vm->slots_lock);
		ret = rv_slot_find(vcpu->vm, gpa) ? 0 : -ENXIO;
		up_read(&vcpu->vm->slots_lock);
		if (!ret)
			rv_answer(vcpu, RAVELIN_ANSWER_ABORT, 0);
	} else {
		ret = rv_fault_in(vcpu, gpa);
	}
	if (!ret)
		return 1;
	if (ret != -ENXIO)
		return rv_memory_fault(vcpu, gpa, ret);

	if (write) {
		rv_answer(vcpu, RAVELIN_ANSWER_COMPLETE, 0);
		if (rv_ioeventfd_signal(vcpu->vm, gpa, exit->size, exit->value))
			return 1;
	} else {
		vcpu->pending = RV_PENDING_LOAD;
	}
	run->exit_reason = KVM_EXIT_MMIO;
	run->mmio.phys_addr = gpa;
	run->mmio.len = exit->size;
	run->mmio.is_write = write;
	memset(run->mmio.data, 0, sizeof(run->mmio.data));
	if (write)
		memcpy(run->mmio.data, &exit->value, min_t(u64, exit->size, sizeof(u64)));
	return 0;
}

/* What is done to the part of a range that a slot has. */
typedef int (*rv_slot_fn)(struct rv_slot *slot, u64 gfn, u64 pages);

/*
 * Does @f to each slot in a range, which takes no time for addresses without slots. Stops at the
 * first error.
 */
static int rv_apply_to_slots(struct rv_vm *vm, u64 gpa, u64 pages, rv_slot_fn f)
{
	u64 gfn = gpa >> PAGE_SHIFT;
	unsigned long index = gfn;
	struct rv_slot *slot;
	int ret = 0;

	if (!pages)
		return 0;
	down_read(&vm->slots_lock);
	mt_for_each(&vm->slot_tree, slot, index, gfn + pages - 1) {
		if (slot->gmem)
			ret = f(slot, gfn, pages);
		if (ret)
			break;
	}
	up_read(&vm->slots_lock);
	return ret;
}

/* Whether userspace wants to know of conversions. */
static bool rv_wants_conversions(struct rv_vm *vm)
{
	return READ_ONCE(vm->hypercall_exits) & BIT(KVM_HC_MAP_GPA_RANGE);
}

/*
 * One conversion of a ring that takes pages back. Whether the hypervisor may end the claims on
 * them.
 */
static bool rv_let_go(struct rv_vm *vm, u64 gpa, u64 pages, unsigned long deadline)
{
	u64 end = gpa + (pages << PAGE_SHIFT);
	struct rv_slot *slot;
	bool done = false;

	/* A VMM that wants to be asked is: the guest calls if its ring is refused. */
	if (rv_wants_conversions(vm))
		return false;
	down_read(&vm->slots_lock);
	slot = rv_slot_find(vm, gpa);
	if (slot && end <= slot->gpa + ((u64)rv_slot_pages(slot) << PAGE_SHIFT))
		done = !rv_gmem_let_go(slot, gpa >> PAGE_SHIFT, pages, deadline);
	up_read(&vm->slots_lock);
	return done;
}

/*
 * What the guest's ring has had done comes with any exit. A share needs nothing: the first access
 * to a page claims it. What the guest takes back has not happened yet. References are waited for as
 * long as for one conversion, however many there are: the VMM wants its thread back.
 */
static void rv_handle_conversions(struct rv_vcpu *vcpu)
{
	struct ravelin_run_entry *entry = vcpu->el2 + RAVELIN_RUN_ENTRY;
	const u64 *words = vcpu->el2 + RAVELIN_RUN_CONVERSIONS;
	unsigned long deadline = jiffies + RV_GMEM_PATIENCE;
	u64 released = 0, n;

	for (n = 0; n < rv_exit(vcpu)->conversions; n++) {
		u64 gpa = words[n] & RAVELIN_CONVERSION_ADDRESS;
		u64 pages = (words[n] & RAVELIN_CONVERSION_PAGES) + 1;

		if (words[n] & RAVELIN_CONVERSION_UNSHARE &&
		    rv_let_go(vcpu->vm, gpa, pages, deadline))
			released |= BIT_ULL(n);
	}
	entry->released = released;
}

static int rv_note_relinquished(struct rv_slot *slot, u64 gfn, u64 pages)
{
	rv_gmem_relinquished(slot, gfn, pages);
	return 0;
}

/* The guest takes pages back: it gets them, or is told that it does not. */
static void rv_unshare(struct rv_vcpu *vcpu)
{
	int ret;

	ret = rv_apply_to_slots(vcpu->vm, rv_exit_gpa(vcpu, NULL), rv_exit(vcpu)->pages,
				rv_gmem_unshare);
	rv_answer(vcpu, ret ? RAVELIN_ANSWER_REFUSE : RAVELIN_ANSWER_RETRY, 0);
}

/* Tells userspace of a conversion, if it wants to know. */
static bool rv_conversion_exit(struct rv_vcpu *vcpu, u64 flags)
{
	struct kvm_run *run = vcpu->run;

	if (!rv_wants_conversions(vcpu->vm))
		return false;
	memset(&run->hypercall, 0, sizeof(run->hypercall));
	run->exit_reason = KVM_EXIT_HYPERCALL;
	run->hypercall.nr = KVM_HC_MAP_GPA_RANGE;
	run->hypercall.args[0] = rv_exit_gpa(vcpu, NULL);
	run->hypercall.args[1] = rv_exit(vcpu)->pages;
	run->hypercall.args[2] = flags;
	return true;
}

static int rv_handle_unshare(struct rv_vcpu *vcpu)
{
	if (rv_conversion_exit(vcpu, RV_MAP_GPA_PRIVATE)) {
		vcpu->pending = RV_PENDING_CONVERT;
		return 0;
	}
	rv_unshare(vcpu);
	return 1;
}

static int rv_handle_host_call(struct rv_vcpu *vcpu)
{
	const u64 *registers = vcpu->el2 + RAVELIN_RUN_CALL;
	struct kvm_run *run = vcpu->run;

	memset(&run->hypercall, 0, sizeof(run->hypercall));
	run->exit_reason = KVM_EXIT_HYPERCALL;
	run->hypercall.nr = RV_SMC_RSI_HOST_CALL;
	run->hypercall.flags = KVM_HYPERCALL_EXIT_SMC;
	run->hypercall.args[0] = rv_exit(vcpu)->value;
	memcpy(&run->hypercall.args[1], registers, 5 * sizeof(u64));
	vcpu->pending = RV_PENDING_HOST_CALL;
	return 0;
}

static int rv_handle_system_event(struct rv_vcpu *vcpu, u32 type)
{
	struct rv_vm *vm = vcpu->vm;

	/* The guest has ended for all of its vCPUs. */
	WRITE_ONCE(vm->ended, type);
	rv_vm_wake_all(vm);
	memset(&vcpu->run->system_event, 0, sizeof(vcpu->run->system_event));
	vcpu->run->exit_reason = KVM_EXIT_SYSTEM_EVENT;
	vcpu->run->system_event.type = type;
	return 0;
}

/* The guest's call needs tables. */
static int rv_handle_needs_tables(struct rv_vcpu *vcpu)
{
	struct rv_vm *vm = vcpu->vm;
	int ret = 0;

	/* Not while the VM is taken from the hypervisor, which collects what was donated. */
	if (down_read_killable(&vm->slots_lock))
		return -EINTR;
	if (vm->phase == RV_LIVE)
		ret = rv_vm_donate_tables(vm, rv_exit(vcpu)->pages);
	up_read(&vm->slots_lock);
	return ret ?: 1;
}

int rv_handle_exit(struct rv_vcpu *vcpu)
{
	const struct ravelin_run_exit *exit = rv_exit(vcpu);
	struct rv_vm *vm = vcpu->vm;

	rv_vm_wake(vm, exit->wake_low, exit->wake_high);
	rv_answer(vcpu, RAVELIN_ANSWER_RETRY, 0);
	rv_handle_conversions(vcpu);

	switch (exit->reason) {
	case RAVELIN_EXIT_INTERRUPTED:
	case RAVELIN_EXIT_WAKE:
	case RAVELIN_EXIT_CONVERTED:
		return 1;
	case RAVELIN_EXIT_WAIT:
		return rv_vcpu_wait(vcpu, exit->deadline);
	case RAVELIN_EXIT_YIELD:
		rv_vcpu_yield(vcpu);
		return 1;
	case RAVELIN_EXIT_MMIO:
		return rv_handle_mmio(vcpu);
	case RAVELIN_EXIT_PAGE_FAULT:
		return rv_handle_fault(vcpu);
	case RAVELIN_EXIT_NEEDS_TABLES:
		return rv_handle_needs_tables(vcpu);
	case RAVELIN_EXIT_UNSHARE:
		return rv_handle_unshare(vcpu);
	case RAVELIN_EXIT_SHARED:
		/* The first access to a page claims it. */
		return !rv_conversion_exit(vcpu, 0);
	case RAVELIN_EXIT_RELINQUISHED:
		rv_apply_to_slots(vm, rv_exit_gpa(vcpu, NULL), exit->pages, rv_note_relinquished);
		return 1;
	case RAVELIN_EXIT_HOST_CALL:
		return rv_handle_host_call(vcpu);
	case RAVELIN_EXIT_CPU_ON:
		if (exit->vcpu < 64)
			rv_vm_wake(vm, BIT_ULL(exit->vcpu), 0);
		else
			rv_vm_wake(vm, 0, BIT_ULL(exit->vcpu - 64));
		return 1;
	case RAVELIN_EXIT_CPU_OFF:
		/* Whoever turned it on since it ran has woken it. */
		vcpu->powered = false;
		return rv_vcpu_wait(vcpu, RAVELIN_RUN_NO_DEADLINE);
	case RAVELIN_EXIT_SYSTEM_OFF:
		return rv_handle_system_event(vcpu, KVM_SYSTEM_EVENT_SHUTDOWN);
	case RAVELIN_EXIT_SYSTEM_RESET:
		return rv_handle_system_event(vcpu, KVM_SYSTEM_EVENT_RESET);
	default:
		WRITE_ONCE(vcpu->failed, true);
		return 1;
	}
}

int rv_complete_exit(struct rv_vcpu *vcpu)
{
	struct ravelin_run_entry *entry = vcpu->el2 + RAVELIN_RUN_ENTRY;
	enum rv_pending pending = vcpu->pending;
	struct kvm_run *run = vcpu->run;
	u64 value, *results;

	entry->flags = rv_wants_conversions(vcpu->vm) ? 0 : RAVELIN_RUN_QUIET_SHARES;
	vcpu->pending = RV_PENDING_NONE;
	switch (pending) {
	case RV_PENDING_NONE:
		break;
	case RV_PENDING_LOAD:
		memcpy(&value, run->mmio.data, sizeof(value));
		rv_answer(vcpu, RAVELIN_ANSWER_COMPLETE, value);
		break;
	case RV_PENDING_HOST_CALL:
		results = vcpu->el2 + RAVELIN_RUN_RESULTS;
		memcpy(results, vcpu->el2 + RAVELIN_RUN_CALL,
		       RAVELIN_RUN_CALL_REGISTERS * sizeof(u64));
		results[0] = READ_ONCE(run->hypercall.ret);
		rv_answer(vcpu, RAVELIN_ANSWER_COMPLETE, 0);
		break;
	case RV_PENDING_CONVERT:
		if (READ_ONCE(run->hypercall.ret))
			rv_answer(vcpu, RAVELIN_ANSWER_REFUSE, 0);
		else
			rv_unshare(vcpu);
		break;
	}
	return 0;
}
