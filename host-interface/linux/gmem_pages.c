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

static struct rv_gmem_block *rv_gmem_block(struct rv_gmem *gmem, pgoff_t index)
{
	return xa_load(&gmem->blocks, index / RV_BLOCK_PAGES);
}

struct page *rv_gmem_page(struct rv_gmem *gmem, pgoff_t index)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, index);

	return block ? block->pages[index % RV_BLOCK_PAGES] : NULL;
}

struct page **rv_gmem_pages(struct rv_gmem *gmem, pgoff_t index)
{
	return &rv_gmem_block(gmem, index)->pages[index % RV_BLOCK_PAGES];
}

bool rv_gmem_is(struct rv_gmem *gmem, pgoff_t index, enum rv_gmem_state state)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, index);

	return block && test_bit(index % RV_BLOCK_PAGES, block->states[state]);
}

struct page *rv_gmem_find(struct rv_gmem *gmem, pgoff_t *index, pgoff_t last,
			  enum rv_gmem_state state)
{
	struct rv_gmem_block *block;
	unsigned long number, i;

	xa_for_each_range(&gmem->blocks, number, block, *index / RV_BLOCK_PAGES,
			  last / RV_BLOCK_PAGES) {
		pgoff_t first = number * RV_BLOCK_PAGES;

		i = find_next_bit(block->states[state], RV_BLOCK_PAGES,
				  *index > first ? *index - first : 0);
		if (i == RV_BLOCK_PAGES)
			continue;
		if (first + i > last)
			break;
		*index = first + i;
		return block->pages[i];
	}
	return NULL;
}

/* The block of the page at @index, which may have none yet. */
static struct rv_gmem_block *rv_gmem_make_block(struct rv_gmem *gmem, pgoff_t index)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, index);
	pgoff_t first = round_down(index, RV_BLOCK_PAGES);

	if (block)
		return block;
	block = kvzalloc(struct_size(block, pages, min(gmem->nr - first, RV_BLOCK_PAGES)),
			 GFP_KERNEL_ACCOUNT);
	if (!block)
		return NULL;
	if (xa_err(xa_store(&gmem->blocks, index / RV_BLOCK_PAGES, block, GFP_KERNEL_ACCOUNT))) {
		kvfree(block);
		return NULL;
	}
	return block;
}

/* Tries to allocate all pages of a block that has none. */
static void rv_gmem_alloc_all(struct rv_gmem_block *block)
{
	struct page *page = alloc_pages(RV_GMEM_BLOCK_GFP, ilog2(RV_BLOCK_PAGES));

	if (!page)
		return;
	/* Each has its own references from here on. The memory stays contiguous. */
	split_page(page, ilog2(RV_BLOCK_PAGES));
	while (block->nr < RV_BLOCK_PAGES)
		block->pages[block->nr++] = page++;
}

/* Allocates the page at @index, which is a hole, and perhaps its neighbours. */
int rv_gmem_alloc(struct rv_gmem *gmem, pgoff_t index)
{
	struct rv_gmem_block *block = rv_gmem_make_block(gmem, index);
	struct page **page;

	if (!block)
		return -ENOMEM;
	if (!block->nr && gmem->nr - round_down(index, RV_BLOCK_PAGES) >= RV_BLOCK_PAGES)
		rv_gmem_alloc_all(block);
	page = &block->pages[index % RV_BLOCK_PAGES];
	if (*page)
		return 0;
	*page = alloc_page(RV_GMEM_GFP);
	if (!*page)
		return -ENOMEM;
	block->nr++;
	return 0;
}

/* The host may have put something into a page that is there. */
void rv_gmem_touched(struct rv_gmem *gmem, pgoff_t index)
{
	__set_bit(index % RV_BLOCK_PAGES, rv_gmem_block(gmem, index)->states[RV_GMEM_TOUCHED]);
}

/* Makes holes, but where a VM has the pages. Who still refers to one keeps it until then. */
void rv_gmem_free(struct rv_gmem *gmem, pgoff_t first, pgoff_t last)
{
	struct rv_gmem_block *block;
	unsigned long number;

	last = min(last, gmem->nr - 1);
	xa_for_each_range(&gmem->blocks, number, block, first / RV_BLOCK_PAGES,
			  last / RV_BLOCK_PAGES) {
		pgoff_t start = number * RV_BLOCK_PAGES;
		unsigned long i = first > start ? first - start : 0;

		for (; i < RV_BLOCK_PAGES && start + i <= last; i++) {
			if (!block->pages[i] || test_bit(i, block->states[RV_GMEM_GIVEN]))
				continue;
			__clear_bit(i, block->states[RV_GMEM_TOUCHED]);
			put_page(block->pages[i]);
			block->pages[i] = NULL;
			block->nr--;
		}
		if (!block->nr) {
			xa_erase(&gmem->blocks, number);
			kvfree(block);
		}
		cond_resched();
	}
}

/* How many pages of one block from @index on are in one state and not in the other. */
unsigned long rv_gmem_length(struct rv_gmem *gmem, pgoff_t index, unsigned long most,
			     enum rv_gmem_state with, enum rv_gmem_state without)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, index);
	unsigned long i = index % RV_BLOCK_PAGES, end = min(RV_BLOCK_PAGES, i + most);

	if (!block)
		return 0;
	end = find_next_zero_bit(block->states[with], end, i);
	return find_next_bit(block->states[without], end, i) - i;
}

/*
 * Finds the first pages in a state in a range, of one block: to take only a part of a block from a
 * VM needs memory for tables.
 */
bool rv_gmem_next_run(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, enum rv_gmem_state state,
		      struct rv_run *run)
{
	struct rv_gmem_block *block;
	unsigned long i, end;

	run->first = first;
	run->page = rv_gmem_find(gmem, &run->first, last, state);
	if (!run->page)
		return false;
	block = rv_gmem_block(gmem, run->first);
	i = run->first % RV_BLOCK_PAGES;
	end = min(RV_BLOCK_PAGES, i + (last - run->first) + 1);
	end = find_next_zero_bit(block->states[state], end, i);
	for (run->nr = 1; i + run->nr < end; run->nr++) {
		if (block->pages[i + run->nr] != run->page + run->nr)
			break;
	}
	return true;
}

/* Whether the VM may have a page along with another one: the host does nothing with it. */
static bool rv_gmem_is_idle(struct rv_gmem *gmem, const struct rv_gmem_block *block,
			    unsigned long i)
{
	if (test_bit(i, block->states[RV_GMEM_GIVEN]))
		return false;
	if (gmem->vm->kind == RV_ORDINARY)
		return true;
	return !test_bit(i, block->states[RV_GMEM_TOUCHED]) &&
	       page_ref_count(block->pages[i]) == 1;
}

/* Returns the pages around the one at @index, in a range, that can go to the VM with it. */
struct rv_run rv_gmem_run_around(struct rv_gmem *gmem, pgoff_t index, pgoff_t first, pgoff_t last)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, index);
	pgoff_t start = round_down(index, RV_BLOCK_PAGES);
	struct rv_run run = { index, 1, block->pages[index - start] };

	first = max(first, start);
	last = min(last, start + RV_BLOCK_PAGES - 1);
	while (run.first > first && block->pages[run.first - 1 - start] == run.page - 1 &&
	       rv_gmem_is_idle(gmem, block, run.first - 1 - start)) {
		run.first--;
		run.page--;
		run.nr++;
	}
	while (index < last && block->pages[index + 1 - start] == run.page + run.nr &&
	       rv_gmem_is_idle(gmem, block, index + 1 - start)) {
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
 * those in a state: it is the one at @busy.
 */
int rv_gmem_isolate(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, enum rv_gmem_state state,
		    pgoff_t *busy)
{
	struct rv_run run;
	unsigned long i;

	if (!rv_gmem_find(gmem, &first, last, state))
		return 0;
	rv_gmem_unmap(gmem, first, last);
	/*
	 * Who gets a reference without a lock, by walking page tables, takes it and then looks
	 * whether the page is still mapped. We have unmapped it, and then look for references.
	 */
	smp_mb();
	for (; first <= last && rv_gmem_next_run(gmem, first, last, state, &run);
	     first = run.first + run.nr) {
		for (i = 0; i < run.nr; i++) {
			if (page_ref_count(run.page + i) != 1) {
				*busy = run.first + i;
				return -EAGAIN;
			}
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

/* Whether the kernel may look into pages of a block that are there. */
static void rv_gmem_set_offline(struct rv_gmem_block *block, unsigned long i, unsigned long nr,
				bool offline)
{
	for (; nr; i++, nr--) {
		if (offline)
			__SetPageOffline(block->pages[i]);
		else
			__ClearPageOffline(block->pages[i]);
	}
}

/*
 * The VM has pages of one block that were the host's. Those of a protected guest are none that the
 * kernel may look into: /proc/kcore, hibernation and crash dumps know them by PageOffline.
 */
void rv_gmem_given(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, first);
	unsigned long i = first % RV_BLOCK_PAGES;

	bitmap_set(block->states[RV_GMEM_GIVEN], i, nr);
	if (gmem->vm->kind == RV_ORDINARY)
		return;
	bitmap_clear(block->states[RV_GMEM_TOUCHED], i, nr);
	rv_gmem_set_offline(block, i, nr, true);
}

/* A guest's pages, of one block, are such that we may touch. */
void rv_gmem_claimed(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, first);

	rv_gmem_set_offline(block, first % RV_BLOCK_PAGES, nr, false);
	bitmap_set(block->states[RV_GMEM_CLAIMED], first % RV_BLOCK_PAGES, nr);
}

/* Pages of one block that we had claimed are none of ours to touch. */
void rv_gmem_released(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, first);

	bitmap_clear(block->states[RV_GMEM_CLAIMED], first % RV_BLOCK_PAGES, nr);
	rv_gmem_set_offline(block, first % RV_BLOCK_PAGES, nr, true);
}

static void rv_gmem_return(struct rv_gmem *gmem, const struct rv_run *run)
{
	struct rv_gmem_block *block = rv_gmem_block(gmem, run->first);
	unsigned long i = run->first % RV_BLOCK_PAGES, end = i + run->nr;

	bitmap_clear(block->states[RV_GMEM_GIVEN], i, run->nr);
	if (gmem->vm->kind == RV_ORDINARY)
		return;
	for (; i < end; i++) {
		if (__test_and_clear_bit(i, block->states[RV_GMEM_CLAIMED]))
			__set_bit(i, block->states[RV_GMEM_TOUCHED]);
		else
			__ClearPageOffline(block->pages[i]);
	}
}

/* Pages that the VM had, and holes among them, are the host's. What was mapped stays mapped. */
void rv_gmem_returned(struct rv_gmem *gmem, pgoff_t first, unsigned long nr)
{
	pgoff_t last = first + nr - 1;
	struct rv_run run;

	for (; first <= last && rv_gmem_next_run(gmem, first, last, RV_GMEM_GIVEN, &run);
	     first = run.first + run.nr)
		rv_gmem_return(gmem, &run);
}
