// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd: its pages and their states.
 *
 * They are neither in the page cache nor on a list of the reclaim, so that nobody but us and who
 * has mapped them refers to them: a page that nobody touches has one reference.
 */
#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/sched/signal.h>

#include "gmem.h"
#include "ravelin_kvm.h"

#define RV_GMEM_GFP (GFP_KERNEL_ACCOUNT | __GFP_ZERO)
/* Good to have, not worth the trouble of others. */
#define RV_GMEM_BLOCK_GFP (RV_GMEM_GFP | __GFP_NOWARN | __GFP_NORETRY)

static int rv_gmem_store(struct rv_gmem *gmem, pgoff_t index, struct page *page)
{
	int err = xa_err(xa_store(&gmem->pages, index, page, GFP_KERNEL_ACCOUNT));

	if (err)
		__free_page(page);
	return err;
}

/* Tries to allocate the aligned 2 MiB around @index, of which there is nothing yet. */
static void rv_gmem_alloc_block(struct rv_gmem *gmem, pgoff_t index)
{
	pgoff_t first = round_down(index, RV_BLOCK_PAGES);
	unsigned long found = first, i;
	struct page *page;

	if (gmem->nr - first < RV_BLOCK_PAGES ||
	    xa_find(&gmem->pages, &found, first + RV_BLOCK_PAGES - 1, XA_PRESENT))
		return;
	page = alloc_pages(RV_GMEM_BLOCK_GFP, ilog2(RV_BLOCK_PAGES));
	if (!page)
		return;
	/* Each has its own references from here on. The memory stays contiguous. */
	split_page(page, ilog2(RV_BLOCK_PAGES));
	for (i = 0; i < RV_BLOCK_PAGES; i++)
		rv_gmem_store(gmem, first + i, page + i);
}

/* Allocates the page at @index, which is a hole, and perhaps its neighbours. */
int rv_gmem_alloc(struct rv_gmem *gmem, pgoff_t index)
{
	struct page *page;

	rv_gmem_alloc_block(gmem, index);
	if (xa_load(&gmem->pages, index))
		return 0;
	page = alloc_page(RV_GMEM_GFP);
	if (!page)
		return -ENOMEM;
	return rv_gmem_store(gmem, index, page);
}

/* Makes holes, but where a VM has the pages. Who still refers to one keeps it until then. */
void rv_gmem_free(struct rv_gmem *gmem, pgoff_t first, pgoff_t last)
{
	unsigned long index;
	struct page *page;

	xa_for_each_range(&gmem->pages, index, page, first, last) {
		if (xa_get_mark(&gmem->pages, index, RV_GMEM_GIVEN))
			continue;
		xa_erase(&gmem->pages, index);
		put_page(page);
		cond_resched();
	}
}

/*
 * Finds the first pages with @mark in a range, of one block: to take only a part of a block from a
 * VM needs memory for tables.
 */
bool rv_gmem_next_run(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, xa_mark_t mark,
		      struct rv_run *run)
{
	XA_STATE(xas, &gmem->pages, first);
	struct page *page;

	rcu_read_lock();
	page = xas_find_marked(&xas, last, mark);
	if (page) {
		run->first = xas.xa_index;
		run->page = page;
		run->nr = 1;
		last = min(last, run->first | (RV_BLOCK_PAGES - 1));
		while (xas.xa_index < last) {
			if (xas_next(&xas) != page + run->nr || !xas_get_mark(&xas, mark))
				break;
			run->nr++;
		}
	}
	rcu_read_unlock();
	return page;
}

/* Whether the VM may have the page along with another one: the host does nothing with it. */
static bool rv_gmem_is_idle(struct rv_gmem *gmem, pgoff_t index)
{
	struct page *page = xa_load(&gmem->pages, index);

	if (!page || xa_get_mark(&gmem->pages, index, RV_GMEM_GIVEN))
		return false;
	if (gmem->vm->kind == RV_ORDINARY)
		return true;
	return !xa_get_mark(&gmem->pages, index, RV_GMEM_TOUCHED) && page_ref_count(page) == 1;
}

/* Returns the pages around the one at @index, in a range, that can go to the VM with it. */
struct rv_run rv_gmem_run_around(struct rv_gmem *gmem, pgoff_t index, pgoff_t first, pgoff_t last)
{
	struct rv_run run = { index, 1, xa_load(&gmem->pages, index) };

	first = max(first, round_down(index, RV_BLOCK_PAGES));
	last = min(last, round_down(index, RV_BLOCK_PAGES) + RV_BLOCK_PAGES - 1);
	while (run.first > first && xa_load(&gmem->pages, run.first - 1) == run.page - 1 &&
	       rv_gmem_is_idle(gmem, run.first - 1)) {
		run.first--;
		run.page--;
		run.nr++;
	}
	while (index < last && xa_load(&gmem->pages, index + 1) == run.page + run.nr &&
	       rv_gmem_is_idle(gmem, index + 1)) {
		index++;
		run.nr++;
	}
	return run;
}

/* Takes pages out of all processes. Until the lock is dropped they do not come back. */
void rv_gmem_unmap(struct rv_gmem *gmem, pgoff_t first, pgoff_t last)
{
	unmap_mapping_range(gmem->inode->i_mapping, (loff_t)first << PAGE_SHIFT,
			    (loff_t)(last - first + 1) << PAGE_SHIFT, 1);
}

/*
 * Takes pages out of all processes. -EAGAIN if after that somebody else still refers to one of
 * those with @mark: it is the one at @busy.
 */
int rv_gmem_isolate(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, xa_mark_t mark,
		    pgoff_t *busy)
{
	unsigned long index = first;
	struct page *page;

	page = xa_find(&gmem->pages, &index, last, mark);
	if (!page)
		return 0;
	rv_gmem_unmap(gmem, index, last);
	/*
	 * Who gets a reference without a lock, by walking page tables, takes it and then looks
	 * whether the page is still mapped. We have unmapped it, and then look for references.
	 */
	smp_mb();
	for (; page; page = xa_find_after(&gmem->pages, &index, last, mark)) {
		if (page_ref_count(page) != 1) {
			*busy = index;
			return -EAGAIN;
		}
		cond_resched();
	}
	return 0;
}

/* Whether to try again what a reference was in the way of. No lock of ours is held. */
bool rv_gmem_wait(unsigned long deadline)
{
	if (time_after(jiffies, deadline) || fatal_signal_pending(current))
		return false;
	usleep_range(500, 1000);
	return true;
}

/*
 * The VM has pages that were the host's. Those of a protected guest are none that the kernel may
 * look into: /proc/kcore, hibernation and crash dumps know them by PageOffline.
 */
void rv_gmem_given(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	XA_STATE(xas, &gmem->pages, first);
	struct page *page;

	xas_lock(&xas);
	xas_for_each(&xas, page, first + nr - 1) {
		xas_set_mark(&xas, RV_GMEM_GIVEN);
		if (gmem->vm->kind == RV_ORDINARY)
			continue;
		xas_clear_mark(&xas, RV_GMEM_TOUCHED);
		__SetPageOffline(page);
	}
	xas_unlock(&xas);
}

/* A guest's pages are such that we may touch. */
void rv_gmem_claimed(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	XA_STATE(xas, &gmem->pages, first);
	struct page *page;

	xas_lock(&xas);
	xas_for_each(&xas, page, first + nr - 1) {
		__ClearPageOffline(page);
		xas_set_mark(&xas, RV_GMEM_CLAIMED);
	}
	xas_unlock(&xas);
}

/* Pages that we had claimed are none of ours to touch. */
void rv_gmem_released(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	XA_STATE(xas, &gmem->pages, first);
	struct page *page;

	xas_lock(&xas);
	xas_for_each(&xas, page, first + nr - 1) {
		xas_clear_mark(&xas, RV_GMEM_CLAIMED);
		__SetPageOffline(page);
	}
	xas_unlock(&xas);
}

static void rv_gmem_return(struct rv_gmem *gmem, pgoff_t first, pgoff_t last)
{
	XA_STATE(xas, &gmem->pages, first);
	struct page *page;

	xas_lock(&xas);
	xas_for_each_marked(&xas, page, last, RV_GMEM_GIVEN) {
		xas_clear_mark(&xas, RV_GMEM_GIVEN);
		if (gmem->vm->kind == RV_ORDINARY)
			continue;
		if (!xas_get_mark(&xas, RV_GMEM_CLAIMED)) {
			__ClearPageOffline(page);
			continue;
		}
		xas_clear_mark(&xas, RV_GMEM_CLAIMED);
		xas_set_mark(&xas, RV_GMEM_TOUCHED);
	}
	xas_unlock(&xas);
}

/* Pages that the VM had, and holes among them, are the host's. What was mapped stays mapped. */
void rv_gmem_returned(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	while (nr) {
		unsigned long part = min_t(unsigned long, nr, RV_BLOCK_PAGES);

		rv_gmem_return(gmem, first, first + part - 1);
		first += part;
		nr -= part;
	}
}
