// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory of an ordinary VM that is a process's own: the guest has what the process has mapped at
 * that time. Nothing is pinned: where the process loses a page, an MMU notifier takes it from the
 * guest first, and the guest's next access brings what is there then. So swapping, fork, madvise
 * and migration work.
 *
 * The notifier runs where memory is reclaimed. Whoever holds map_lock therefore allocates
 * nothing.
 */

#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "ravelin_kvm.h"

#define RV_BLOCK_SIZE	(RV_BLOCK_PAGES * PAGE_SIZE)

static u64 rv_slot_gpa(const struct rv_slot *slot, u64 index)
{
	return slot->gpa + (index << PAGE_SHIFT);
}

/* Which of the aligned 2 MiB of guest addresses a page is in, counted from the slot's first. */
static u64 rv_block_of(const struct rv_slot *slot, u64 index)
{
	return rv_slot_gpa(slot, index) / RV_BLOCK_SIZE - slot->gpa / RV_BLOCK_SIZE;
}

static u64 rv_block_count(const struct rv_slot *slot)
{
	return rv_block_of(slot, rv_slot_pages(slot) - 1) + 1;
}

/*
 * The first page of the aligned 2 MiB that a page is in. Meaningful if they are all in the slot.
 */
static u64 rv_block_start(const struct rv_slot *slot, u64 index)
{
	return index - (rv_slot_gpa(slot, index) % RV_BLOCK_SIZE >> PAGE_SHIFT);
}

/*
 * Takes so many pages, or one block, from the guest. Cannot fail while the bits of the slot are
 * right, but for a short time in which another CPU changes the VM.
 */
static void rv_anon_take(struct rv_slot *slot, u64 index, u64 pages)
{
	struct rv_vm *vm = slot->vm;
	u64 gpa = rv_slot_gpa(slot, index);
	struct rv_result result;
	long status;

	do {
		status = rv_hyp(RAVELIN_CALL_VM_UNMAP, NULL, vm->handle, gpa, pages);
		/* The VM is being torn down. */
		if (status == RAVELIN_STATUS_WRONG_STATE) {
			status = rv_hyp(RAVELIN_CALL_VM_RECLAIM, &result, vm->handle, gpa, pages);
			if (!status && result.x1 < pages) {
				gpa += result.x1 << PAGE_SHIFT;
				pages -= result.x1;
				status = RAVELIN_STATUS_BUSY;
			}
		}
		cpu_relax();
	} while (status == RAVELIN_STATUS_BUSY);
	WARN_ONCE(status, "a guest keeps memory of a process: %ld\n", status);
}

/* Takes what the guest has of the pages from @first to before @end. map_lock is held. */
static void rv_anon_unmap(struct rv_slot *slot, u64 first, u64 end, bool may_sleep)
{
	u64 index = first, next;

	for (;;) {
		index = find_next_bit(slot->mapped, end, index);
		if (index >= end)
			return;
		if (test_and_clear_bit(rv_block_of(slot, index), slot->blocks)) {
			/* Part of a block needs a table. All of it does not. */
			index = rv_block_start(slot, index);
			next = index + RV_BLOCK_PAGES;
		} else {
			next = min3(end, index + RV_BLOCK_PAGES,
				    rv_block_start(slot, index) + RV_BLOCK_PAGES);
			next = find_next_zero_bit(slot->mapped, next, index);
		}
		rv_anon_take(slot, index, next - index);
		bitmap_clear(slot->mapped, index, next - index);
		index = next;
		if (may_sleep)
			cond_resched();
	}
}

static bool rv_anon_invalidate(struct mmu_interval_notifier *notifier,
			       const struct mmu_notifier_range *range, unsigned long seq)
{
	struct rv_slot *slot = container_of(notifier, struct rv_slot, notifier);
	bool may_sleep = mmu_notifier_range_blockable(range);
	u64 start = max_t(u64, range->start, slot->hva) - slot->hva;
	u64 end = min_t(u64, range->end, slot->hva + slot->size) - slot->hva;

	if (may_sleep)
		mutex_lock(&slot->map_lock);
	else if (!mutex_trylock(&slot->map_lock))
		return false;
	mmu_interval_set_seq(notifier, seq);
	rv_anon_unmap(slot, start >> PAGE_SHIFT, DIV_ROUND_UP(end, PAGE_SIZE), may_sleep);
	mutex_unlock(&slot->map_lock);
	return true;
}

static const struct mmu_interval_notifier_ops rv_anon_ops = {
	.invalidate = rv_anon_invalidate,
};

int rv_anon_bind(struct rv_slot *slot)
{
	int ret = -ENOMEM;

	mutex_init(&slot->map_lock);
	slot->mapped = kvcalloc(BITS_TO_LONGS(rv_slot_pages(slot)), sizeof(long),
				GFP_KERNEL_ACCOUNT);
	slot->blocks = kvcalloc(BITS_TO_LONGS(rv_block_count(slot)), sizeof(long),
				GFP_KERNEL_ACCOUNT);
	if (slot->mapped && slot->blocks)
		ret = mmu_interval_notifier_insert(&slot->notifier, slot->vm->mm, slot->hva,
						   slot->size, &rv_anon_ops);
	if (ret) {
		kvfree(slot->mapped);
		kvfree(slot->blocks);
	}
	return ret;
}

void rv_anon_unbind(struct rv_slot *slot)
{
	mutex_lock(&slot->map_lock);
	rv_anon_unmap(slot, 0, rv_slot_pages(slot), true);
	mutex_unlock(&slot->map_lock);
	mmu_interval_notifier_remove(&slot->notifier);
	kvfree(slot->mapped);
	kvfree(slot->blocks);
}

void rv_anon_reclaim(struct rv_slot *slot)
{
	mutex_lock(&slot->map_lock);
	rv_anon_unmap(slot, 0, rv_slot_pages(slot), true);
	mutex_unlock(&slot->map_lock);
}

static void rv_put_pages(struct page **pages, long count)
{
	while (count > 0)
		put_page(pages[--count]);
}

/*
 * Gets pages that the process may write, and that stay there as long as the notifier is silent.
 */
static int rv_get_pages(struct rv_slot *slot, u64 index, long count, struct page **pages)
{
	unsigned long hva = slot->hva + (index << PAGE_SHIFT);
	long got, i;

	got = get_user_pages_fast(hva, count, FOLL_WRITE, pages);
	if (got != count) {
		rv_put_pages(pages, got);
		return got < 0 ? got : -EFAULT;
	}
	/* The guest writes without the page tables' knowledge. */
	for (i = 0; i < count; i++)
		set_page_dirty_lock(pages[i]);
	return 0;
}

/*
 * Lends the guest one page or one block that the process has. -EAGAIN if the process's memory
 * has changed meanwhile, or if tables had to be donated.
 */
static int rv_anon_map(struct rv_slot *slot, u64 index, struct page **pages, long count,
		       unsigned long seq)
{
	struct rv_vm *vm = slot->vm;
	struct rv_result result;
	long status;

	mutex_lock(&slot->map_lock);
	if (mmu_interval_read_retry(&slot->notifier, seq)) {
		mutex_unlock(&slot->map_lock);
		return -EAGAIN;
	}
	if (find_next_bit(slot->mapped, index + count, index) < index + count) {
		/* Another vCPU was faster. */
		mutex_unlock(&slot->map_lock);
		return 0;
	}
	status = rv_hyp(RAVELIN_CALL_VM_MAP, &result, vm->handle, rv_slot_gpa(slot, index),
			page_to_phys(pages[0]), count);
	if (!status) {
		bitmap_set(slot->mapped, index, count);
		if (count == RV_BLOCK_PAGES)
			__set_bit(rv_block_of(slot, index), slot->blocks);
	}
	mutex_unlock(&slot->map_lock);

	switch (status) {
	case RAVELIN_STATUS_NEEDS_TABLES:
		return rv_vm_donate_tables(vm, result.x1) ?: -EAGAIN;
	case RAVELIN_STATUS_BUSY:
		return -EAGAIN;
	case RAVELIN_STATUS_SUCCESS:
		return 0;
	default:
		/* No RAM, or memory that is lent to another guest. */
		return -EFAULT;
	}
}

/* Whether the 2 MiB around a page may be one block: alignment, huge page, nothing mapped yet. */
static bool rv_may_be_block(struct rv_slot *slot, u64 index, struct page *page)
{
	u64 start = rv_block_start(slot, index);
	u64 hva = slot->hva + (index << PAGE_SHIFT);

	if ((rv_slot_gpa(slot, index) ^ hva) % RV_BLOCK_SIZE ||
	    (page_to_phys(page) ^ hva) % RV_BLOCK_SIZE)
		return false;
	if (start > index || start + RV_BLOCK_PAGES > rv_slot_pages(slot))
		return false;
	if (folio_nr_pages(page_folio(page)) < RV_BLOCK_PAGES)
		return false;
	return find_next_bit(slot->mapped, start + RV_BLOCK_PAGES, start) >=
	       start + RV_BLOCK_PAGES;
}

static int rv_anon_map_block(struct rv_slot *slot, u64 index, unsigned long seq)
{
	struct page **pages;
	int ret, i;

	pages = kmalloc_array(RV_BLOCK_PAGES, sizeof(*pages), GFP_KERNEL_ACCOUNT);
	if (!pages)
		return -ENOMEM;
	index = rv_block_start(slot, index);
	ret = rv_get_pages(slot, index, RV_BLOCK_PAGES, pages);
	if (ret)
		goto free;
	for (i = 1; i < RV_BLOCK_PAGES; i++) {
		if (page_to_pfn(pages[i]) != page_to_pfn(pages[0]) + i)
			ret = -EFAULT;
	}
	if (!ret)
		ret = rv_anon_map(slot, index, pages, RV_BLOCK_PAGES, seq);
	rv_put_pages(pages, RV_BLOCK_PAGES);
free:
	kfree(pages);
	return ret;
}

int rv_anon_fault(struct rv_slot *slot, u64 gpa)
{
	u64 index = (gpa - slot->gpa) >> PAGE_SHIFT;
	unsigned long seq;
	struct page *page;
	int ret;

	do {
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
		seq = mmu_interval_read_begin(&slot->notifier);
		ret = rv_get_pages(slot, index, 1, &page);
		if (ret)
			return ret;
		ret = -EFAULT;
		if (rv_may_be_block(slot, index, page))
			ret = rv_anon_map_block(slot, index, seq);
		/* What cannot be a block is a page. */
		if (ret && ret != -EAGAIN)
			ret = rv_anon_map(slot, index, &page, 1, seq);
		put_page(page);
	} while (ret == -EAGAIN);
	return ret;
}
