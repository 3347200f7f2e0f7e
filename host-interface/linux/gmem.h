/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * guest_memfd: what its files share.
 *
 * gmem.c has the file and what processes do with it, gmem_attributes.c its ioctl, gmem_pages.c
 * the pages and their states, gmem_convert.c how they go to the guest and come back.
 */
#ifndef RV_GMEM_H
#define RV_GMEM_H

#include <linux/bitmap.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/maple_tree.h>
#include <linux/mm.h>
#include <linux/rwsem.h>
#include <linux/xarray.h>

#include "ravelin_kvm.h"

/*
 * States of a page. In none of them it is the host's, and nobody has touched it.
 *
 *   TOUCHED        the host's, which may have put something there; processes may map it
 *   GIVEN          a protected guest's, private or offered: the hypervisor knows; PageOffline
 *   GIVEN CLAIMED  a protected guest's, offered; we may touch it
 *   GIVEN TOUCHED  the host's, lent to an ordinary VM; GIVEN alone: as long as nobody touches it
 */
enum rv_gmem_state {
	RV_GMEM_GIVEN,
	RV_GMEM_CLAIMED,
	RV_GMEM_TOUCHED,
	RV_GMEM_STATES,
};

/* What there is of an aligned 2 MiB of the file. Freed with its last page. */
struct rv_gmem_block {
	unsigned int nr;	/* of pages that are no holes */
	unsigned long states[RV_GMEM_STATES][BITS_TO_LONGS(RV_BLOCK_PAGES)];
	struct page *pages[];	/* fewer than RV_BLOCK_PAGES at the end of the file */
};

struct rv_gmem {
	struct rv_vm *vm;
	struct inode *inode;
	u64 flags;		/* GUEST_MEMFD_FLAG_* */
	pgoff_t nr;		/* pages of the file */

	struct rw_semaphore lock;	/* all below, for writing */
	struct xarray blocks;		/* by number */
	struct maple_tree attributes;	/* where they are not as the flags say */
	struct list_head slots;		/* by rv_slot.gmem_link */
	unsigned long claim_ahead;	/* how many pages to claim with one that is touched */
};

/* Pages of the file that are contiguous memory. */
struct rv_run {
	pgoff_t first;
	unsigned long nr;
	struct page *page;
};

/* gmem_pages.c: the lock is held, for writing by whoever changes something. */
struct page *rv_gmem_page(struct rv_gmem *gmem, pgoff_t index);
/* That page, which is there, and those behind it up to the end of its block. */
struct page **rv_gmem_pages(struct rv_gmem *gmem, pgoff_t index);
bool rv_gmem_is(struct rv_gmem *gmem, pgoff_t index, enum rv_gmem_state state);
/* Finds the first page in a state from @index on, up to @last. */
struct page *rv_gmem_find(struct rv_gmem *gmem, pgoff_t *index, pgoff_t last,
			  enum rv_gmem_state state);
int rv_gmem_alloc(struct rv_gmem *gmem, pgoff_t index);
void rv_gmem_touched(struct rv_gmem *gmem, pgoff_t index);
void rv_gmem_free(struct rv_gmem *gmem, pgoff_t first, pgoff_t last);
unsigned long rv_gmem_length(struct rv_gmem *gmem, pgoff_t index, unsigned long most,
			     enum rv_gmem_state with, enum rv_gmem_state without);
bool rv_gmem_next_run(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, enum rv_gmem_state state,
		      struct rv_run *run);
struct rv_run rv_gmem_run_around(struct rv_gmem *gmem, pgoff_t index, pgoff_t first, pgoff_t last);
void rv_gmem_unmap(struct rv_gmem *gmem, pgoff_t first, pgoff_t last);
int rv_gmem_isolate(struct rv_gmem *gmem, pgoff_t first, pgoff_t last,
		    enum rv_gmem_state state, pgoff_t *busy);
bool rv_gmem_wait(unsigned long deadline);
void rv_gmem_given(struct rv_gmem *gmem, pgoff_t first, unsigned long nr);
void rv_gmem_claimed(struct rv_gmem *gmem, pgoff_t first, unsigned long nr);
void rv_gmem_released(struct rv_gmem *gmem, pgoff_t first, unsigned long nr);
void rv_gmem_returned(struct rv_gmem *gmem, pgoff_t first, unsigned long nr);

/* gmem_convert.c: the lock is held for writing. */
int rv_gmem_claim(struct rv_gmem *gmem, pgoff_t index, pgoff_t last);
int rv_gmem_claim_ahead(struct rv_gmem *gmem, pgoff_t index);
int rv_gmem_claim_block(struct rv_gmem *gmem, pgoff_t first);
int rv_gmem_unclaim(struct rv_gmem *gmem, pgoff_t first, pgoff_t last, pgoff_t *busy);
/* slots_lock is held, too. */
int rv_gmem_take_back(struct rv_gmem *gmem, pgoff_t first, pgoff_t last);
int rv_gmem_take_slot(struct rv_slot *slot);

/* gmem_attributes.c: the lock is held. Whether the host may touch a page that no guest has. */
bool rv_gmem_host_may(struct rv_gmem *gmem, pgoff_t index);
long rv_gmem_ioctl(struct file *file, unsigned int ioctl, unsigned long arg);

#endif /* RV_GMEM_H */
