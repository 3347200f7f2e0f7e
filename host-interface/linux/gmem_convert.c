// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd: from the host to the guest and back.
 *
 * A page is either one that the guest may have for itself, or one that the host may refer to.
 * Who wants it the other way around unmaps it first, and then looks for references that remain:
 * all of it under the lock, which every access of the host takes.
 */
#include <linux/jiffies.h>
#include <linux/overflow.h>

#include "gmem.h"
#include "ravelin_kvm.h"

static pgoff_t rv_gmem_slot_last(const struct rv_slot *slot)
{
	return slot->gmem_index + rv_slot_pages(slot) - 1;
}

static u64 rv_gmem_gpa(const struct rv_slot *slot, pgoff_t index)
{
	return slot->gpa + ((u64)(index - slot->gmem_index) << PAGE_SHIFT);
}

/* Finds the part of a range of guest frames that the slot has. */
static bool rv_gmem_range(const struct rv_slot *slot, u64 gfn, u64 pages, pgoff_t *first,
			  pgoff_t *last)
{
	u64 base = slot->gpa >> PAGE_SHIFT;
	u64 end = base + rv_slot_pages(slot);

	if (!pages || check_add_overflow(gfn, pages, &pages))
		return false;
	gfn = max(gfn, base);
	end = min(end, pages);
	if (gfn >= end)
		return false;
	*first = slot->gmem_index + (gfn - base);
	*last = slot->gmem_index + (end - 1 - base);
	return true;
}

/* How many pages from @index on may be offered, and the host wants them: not more than @most. */
static unsigned long rv_gmem_claimable(struct rv_gmem *gmem, pgoff_t index, unsigned long most)
{
	unsigned long nr;

	most = rv_gmem_length(gmem, index, most, RV_GMEM_GIVEN, RV_GMEM_CLAIMED);
	for (nr = 1; nr < most; nr++) {
		if (!rv_gmem_host_may(gmem, index + nr))
			break;
	}
	return nr;
}

/*
 * Claims up to @most pages of a slot: the first is what matters, and those behind it that the guest
 * has offered, too. Returns how many.
 */
static long rv_gmem_claim_run(struct rv_slot *slot, pgoff_t index, unsigned long most)
{
	u64 gpa = rv_gmem_gpa(slot, index);
	struct rv_result result;
	unsigned long nr;
	long status;

	most = min(most, rv_gmem_slot_last(slot) - index + 1);
	nr = rv_gmem_claimable(slot->gmem, index, most);
	status = rv_vm_hyp(slot->vm, RAVELIN_CALL_CLAIM, &result, gpa, nr);
	if (status == RAVELIN_STATUS_NOT_OFFERED && result.x1 > gpa) {
		/* The address of the first page that is not offered. */
		nr = min_t(u64, nr, (result.x1 - gpa) >> PAGE_SHIFT);
		status = rv_vm_hyp(slot->vm, RAVELIN_CALL_CLAIM, NULL, gpa, nr);
	}
	if (status && nr > 1) {
		nr = 1;
		status = rv_vm_hyp(slot->vm, RAVELIN_CALL_CLAIM, NULL, gpa, nr);
	}
	if (status)
		return -EFAULT;
	rv_gmem_claimed(slot->gmem, index, nr);
	return nr;
}

static struct rv_slot *rv_gmem_slot(struct rv_gmem *gmem, pgoff_t index)
{
	struct rv_slot *slot;

	list_for_each_entry(slot, &gmem->slots, gmem_link) {
		if (index >= slot->gmem_index && index <= rv_gmem_slot_last(slot))
			return slot;
	}
	return NULL;
}

/* Asks for access to a page that a guest has, and perhaps to others up to @last. */
int rv_gmem_claim(struct rv_gmem *gmem, pgoff_t index, pgoff_t last)
{
	struct rv_slot *slot = rv_gmem_slot(gmem, index);
	long nr = slot ? rv_gmem_claim_run(slot, index, last - index + 1) : -EFAULT;

	return min(nr, 0L);
}

/*
 * The same for a page that is touched, and some behind it: twice as many as the last time, or as
 * many as it were then.
 */
int rv_gmem_claim_ahead(struct rv_gmem *gmem, pgoff_t index)
{
	unsigned long most = gmem->claim_ahead + 1;
	struct rv_slot *slot = rv_gmem_slot(gmem, index);
	long nr = slot ? rv_gmem_claim_run(slot, index, most) : -EFAULT;

	if (nr > 0)
		gmem->claim_ahead = min(nr == most ? 2 * most : nr, RV_BLOCK_PAGES) - 1;
	return min(nr, 0L);
}

/* Asks for access to all of a block, of which a guest has all pages. */
int rv_gmem_claim_block(struct rv_gmem *gmem, pgoff_t first)
{
	struct rv_slot *slot = rv_gmem_slot(gmem, first);
	pgoff_t index = first, end = first + RV_BLOCK_PAGES;
	unsigned long nr;

	if (!slot || rv_gmem_slot_last(slot) < end - 1)
		return -EFAULT;
	for (; index < end; index += nr) {
		nr = 1;
		if (rv_gmem_is(gmem, index, RV_GMEM_CLAIMED))
			continue;
		nr = rv_gmem_claimable(gmem, index, end - index);
		if (!rv_gmem_host_may(gmem, index) ||
		    rv_vm_hyp(slot->vm, RAVELIN_CALL_CLAIM, NULL, rv_gmem_gpa(slot, index), nr))
			return -EFAULT;
		rv_gmem_claimed(gmem, index, nr);
	}
	return 0;
}

static int rv_gmem_give(struct rv_slot *slot, const struct rv_run *run)
{
	long status;

	status = rv_vm_hyp(slot->vm, RAVELIN_CALL_VM_MAP, NULL, rv_gmem_gpa(slot, run->first),
			   page_to_phys(run->page), run->nr);
	if (!status)
		rv_gmem_given(slot->gmem, run->first, run->nr);
	return rv_errno(status);
}

static int rv_gmem_isolate_payload(struct rv_slot *slot)
{
	pgoff_t busy;

	return rv_gmem_isolate(slot->gmem, slot->gmem_index, rv_gmem_slot_last(slot),
			       RV_GMEM_TOUCHED, &busy);
}

static int rv_gmem_give_payload(struct rv_slot *slot)
{
	struct rv_gmem *gmem = slot->gmem;
	pgoff_t first = slot->gmem_index, last = rv_gmem_slot_last(slot);
	struct rv_run run;
	int err;

	err = rv_gmem_isolate_payload(slot);
	while (!err && rv_gmem_next_run(gmem, first, last, RV_GMEM_TOUCHED, &run)) {
		err = rv_gmem_give(slot, &run);
		first = run.first + run.nr;
		cond_resched();
	}
	return err;
}

/* Does @f under the lock, and again while references are in the way. */
static int rv_gmem_with_payload(struct rv_slot *slot, int (*f)(struct rv_slot *slot))
{
	unsigned long deadline = jiffies + RV_GMEM_PATIENCE;
	struct rv_gmem *gmem = slot->gmem;
	int err;

	if (!gmem)
		return 0;
	do {
		down_write(&gmem->lock);
		err = f(slot);
		up_write(&gmem->lock);
	} while (err == -EAGAIN && rv_gmem_wait(deadline));
	return err;
}

int rv_gmem_prepare(struct rv_slot *slot)
{
	return rv_gmem_with_payload(slot, rv_gmem_isolate_payload);
}

int rv_gmem_populate(struct rv_slot *slot)
{
	return rv_gmem_with_payload(slot, rv_gmem_give_payload);
}

/* Gives a page, and what lies around it unused, so that memory goes to the guest in blocks. */
static int rv_gmem_give_around(struct rv_slot *slot, pgoff_t index)
{
	struct rv_run run = rv_gmem_run_around(slot->gmem, index, slot->gmem_index,
					       rv_gmem_slot_last(slot));
	int err = rv_gmem_give(slot, &run);

	if (err && run.nr > 1) {
		/* A neighbour's frame may be poisoned. */
		run.page += index - run.first;
		run.first = index;
		run.nr = 1;
		err = rv_gmem_give(slot, &run);
	}
	return err;
}

static int rv_gmem_fault_locked(struct rv_slot *slot, pgoff_t index)
{
	struct rv_gmem *gmem = slot->gmem;
	pgoff_t busy;
	int err;

	if (!rv_gmem_page(gmem, index)) {
		err = rv_gmem_alloc(gmem, index);
		if (err)
			return err;
	}
	/* Another vCPU was faster; or the guest has relinquished it, and we hear of it soon. */
	if (rv_gmem_is(gmem, index, RV_GMEM_GIVEN))
		return 0;
	if (gmem->vm->kind != RV_ORDINARY) {
		err = rv_gmem_isolate(gmem, index, index, RV_GMEM_TOUCHED, &busy);
		if (err)
			return err;
	}
	return rv_gmem_give_around(slot, index);
}

int rv_gmem_fault(struct rv_slot *slot, u64 gfn)
{
	unsigned long deadline = jiffies + RV_GMEM_PATIENCE;
	struct rv_gmem *gmem = slot->gmem;
	pgoff_t first, last;
	int err;

	if (!gmem || !rv_gmem_range(slot, gfn, 1, &first, &last))
		return -EFAULT;
	do {
		down_write(&gmem->lock);
		err = rv_gmem_fault_locked(slot, first);
		up_write(&gmem->lock);
	} while (err == -EAGAIN && rv_gmem_wait(deadline));
	return err;
}

/* Gives up all claims in a range. All or nothing: -EAGAIN if somebody refers to a page. */
static int rv_gmem_unclaim_slot(struct rv_slot *slot, pgoff_t first, pgoff_t last, pgoff_t *busy)
{
	struct rv_gmem *gmem = slot->gmem;
	struct rv_run run;
	long status;
	int err;

	err = rv_gmem_isolate(gmem, first, last, RV_GMEM_CLAIMED, busy);
	while (!err && rv_gmem_next_run(gmem, first, last, RV_GMEM_CLAIMED, &run)) {
		status = rv_vm_hyp(slot->vm, RAVELIN_CALL_RELEASE, NULL,
				   rv_gmem_gpa(slot, run.first), run.nr);
		if (status)
			return rv_errno(status);
		rv_gmem_released(gmem, run.first, run.nr);
		first = run.first + run.nr;
		cond_resched();
	}
	return err;
}

/* The same for a range of the file. */
int rv_gmem_unclaim(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, pgoff_t *busy)
{
	struct rv_slot *slot;
	int err;

	err = rv_gmem_isolate(gmem, first, last, RV_GMEM_CLAIMED, busy);
	list_for_each_entry(slot, &gmem->slots, gmem_link) {
		pgoff_t from = max(first, slot->gmem_index);
		pgoff_t to = min(last, rv_gmem_slot_last(slot));

		if (!err && from <= to)
			err = rv_gmem_unclaim_slot(slot, from, to, busy);
	}
	return err;
}

int rv_gmem_unshare(struct rv_slot *slot, u64 gfn, u64 pages)
{
	unsigned long deadline = jiffies + RV_GMEM_PATIENCE;
	struct rv_gmem *gmem = slot->gmem;
	pgoff_t first, last, busy;
	int err;

	if (!gmem || !rv_gmem_range(slot, gfn, pages, &first, &last))
		return 0;
	do {
		down_write(&gmem->lock);
		err = rv_gmem_unclaim_slot(slot, first, last, &busy);
		up_write(&gmem->lock);
	} while (err == -EAGAIN && rv_gmem_wait(deadline));
	return err == -EAGAIN ? -EBUSY : err;
}

/*
 * Forgets claims that the hypervisor ends when the vCPU runs next, many at once. Until then the
 * pages are claimed and we do not know it: who touches one gets SIGBUS, as ever after.
 */
int rv_gmem_let_go(struct rv_slot *slot, u64 gfn, u64 pages, unsigned long deadline)
{
	struct rv_gmem *gmem = slot->gmem;
	pgoff_t first, last, busy;
	struct rv_run run;
	int err;

	if (!gmem || !rv_gmem_range(slot, gfn, pages, &first, &last))
		return -EFAULT;
	do {
		down_write(&gmem->lock);
		err = rv_gmem_isolate(gmem, first, last, RV_GMEM_CLAIMED, &busy);
		while (!err && rv_gmem_next_run(gmem, first, last, RV_GMEM_CLAIMED, &run)) {
			rv_gmem_released(gmem, run.first, run.nr);
			first = run.first + run.nr;
		}
		up_write(&gmem->lock);
	} while (err == -EAGAIN && rv_gmem_wait(deadline));
	return err;
}

static bool rv_gmem_is_ours(struct page *page)
{
	struct rv_result result;

	return rv_hyp(RAVELIN_CALL_PAGE_STATE, &result, page_to_phys(page), 0) ==
	       RAVELIN_STATUS_SUCCESS && result.x1 == RAVELIN_PAGE_OWNED;
}

/*
 * Returns pages that the guest does not want any more to Linux. It may have taken up another page
 * in the same place before we got here, so the hypervisor is asked.
 */
void rv_gmem_relinquished(struct rv_slot *slot, u64 gfn, u64 pages)
{
	struct rv_gmem *gmem = slot->gmem;
	pgoff_t index, last;
	struct page *page;

	if (!gmem || !rv_gmem_range(slot, gfn, pages, &index, &last))
		return;
	down_write(&gmem->lock);
	for (; (page = rv_gmem_find(gmem, &index, last, RV_GMEM_GIVEN)); index++) {
		if (rv_gmem_is_ours(page)) {
			rv_gmem_returned(gmem, index, 1);
			if (rv_gmem_is(gmem, index, RV_GMEM_TOUCHED))
				rv_gmem_unmap(gmem, index, index);
			rv_gmem_free(gmem, index, index);
		}
		cond_resched();
	}
	up_write(&gmem->lock);
}

/*
 * How much of a range to take back in a call. Its end cuts no block, which could need memory for
 * tables.
 */
static pgoff_t rv_gmem_reclaim_pages(const struct rv_slot *slot, pgoff_t first, pgoff_t last)
{
	u64 gfn = rv_gmem_gpa(slot, first) >> PAGE_SHIFT;

	return min_t(pgoff_t, last - first + 1,
		     RAVELIN_VM_RECLAIM_MAX_PAGES - gfn % RV_BLOCK_PAGES);
}

/* Takes pages from a VM that was torn down. */
static int rv_gmem_reclaim_range(struct rv_slot *slot, pgoff_t first, pgoff_t last)
{
	struct rv_gmem *gmem = slot->gmem;
	struct rv_result result;
	unsigned long index = first;
	long status;

	while (rv_gmem_find(gmem, &index, last, RV_GMEM_GIVEN)) {
		status = rv_vm_hyp(slot->vm, RAVELIN_CALL_VM_RECLAIM, &result,
				   rv_gmem_gpa(slot, index),
				   rv_gmem_reclaim_pages(slot, index, last));
		if (status)
			return rv_errno(status);
		if (!result.x1)
			return -EIO;
		rv_gmem_returned(gmem, index, result.x1);
		index += result.x1;
		cond_resched();
	}
	return 0;
}

void rv_gmem_reclaim(struct rv_slot *slot)
{
	struct rv_gmem *gmem = slot->gmem;

	if (!gmem)
		return;
	down_write(&gmem->lock);
	rv_gmem_reclaim_range(slot, slot->gmem_index, rv_gmem_slot_last(slot));
	up_write(&gmem->lock);
}

/* Takes pages from an ordinary VM. */
static int rv_gmem_unlend(struct rv_slot *slot, pgoff_t first, pgoff_t last)
{
	struct rv_gmem *gmem = slot->gmem;
	struct rv_run run;
	long status;

	while (rv_gmem_next_run(gmem, first, last, RV_GMEM_GIVEN, &run)) {
		status = rv_vm_hyp(slot->vm, RAVELIN_CALL_VM_UNMAP, NULL,
				   rv_gmem_gpa(slot, run.first), run.nr);
		if (status)
			return rv_errno(status);
		rv_gmem_returned(gmem, run.first, run.nr);
		first = run.first + run.nr;
		cond_resched();
	}
	return 0;
}

static long rv_gmem_force_run(struct rv_vm *vm, const struct rv_run *run)
{
	struct rv_result result;
	long status;

	do {
		status = rv_hyp(RAVELIN_CALL_FORCE_RECLAIM, &result, page_to_phys(run->page),
				run->nr);
	} while (status == RAVELIN_STATUS_NEEDS_TABLES && !rv_vm_donate_tables(vm, result.x1));
	return status;
}

/* Takes pages from a protected guest, which then finds them poisoned. */
static int rv_gmem_force(struct rv_slot *slot, pgoff_t first, pgoff_t last)
{
	struct rv_gmem *gmem = slot->gmem;
	struct rv_run run;
	pgoff_t busy;
	long status;
	int err;

	err = rv_gmem_unclaim_slot(slot, first, last, &busy);
	if (err)
		return err;
	while (rv_gmem_next_run(gmem, first, last, RV_GMEM_GIVEN, &run)) {
		status = rv_gmem_force_run(slot->vm, &run);
		if (status == RAVELIN_STATUS_DENIED) {
			/*
			 * The guest may have relinquished some of them, or not run since we let go.
			 */
			run.nr = 1;
			rv_vm_hyp(slot->vm, RAVELIN_CALL_RELEASE, NULL,
				  rv_gmem_gpa(slot, run.first), run.nr);
			status = rv_gmem_is_ours(run.page) ? RAVELIN_STATUS_SUCCESS :
							     rv_gmem_force_run(slot->vm, &run);
		}
		if (status)
			return rv_errno(status);
		rv_gmem_returned(gmem, run.first, run.nr);
		first = run.first + run.nr;
		cond_resched();
	}
	return 0;
}

static int rv_gmem_take_from(struct rv_slot *slot, pgoff_t first, pgoff_t last)
{
	if (slot->vm->phase != RV_LIVE)
		return rv_gmem_reclaim_range(slot, first, last);
	if (slot->vm->kind == RV_ORDINARY)
		return rv_gmem_unlend(slot, first, last);
	return rv_gmem_force(slot, first, last);
}

/* Makes all pages of a slot the host's. */
int rv_gmem_take_slot(struct rv_slot *slot)
{
	return rv_gmem_take_from(slot, slot->gmem_index, rv_gmem_slot_last(slot));
}

/* Makes pages the host's, whoever has them. -EAGAIN if somebody refers to one that is shared. */
int rv_gmem_take_back(struct rv_gmem *gmem, pgoff_t first, pgoff_t last)
{
	struct rv_slot *slot;
	int err = 0;

	list_for_each_entry(slot, &gmem->slots, gmem_link) {
		pgoff_t from = max(first, slot->gmem_index);
		pgoff_t to = min(last, rv_gmem_slot_last(slot));

		if (from <= to)
			err = rv_gmem_take_from(slot, from, to);
		if (err)
			break;
	}
	return err;
}
