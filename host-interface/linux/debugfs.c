// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hypervisor's statistics, as debugfs/ravelin/statistics.
 */

#include <linux/debugfs.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/seq_file.h>

#include "hyp.h"
#include "ravelin_kvm.h"

#define RV_COUNTER(name) { #name, offsetof(struct ravelin_statistics, name) }

static const struct {
	const char *name;
	size_t offset;
} rv_counters[] = {
	RV_COUNTER(host_owned_pages),
	RV_COUNTER(host_shared_pages),
	RV_COUNTER(hypervisor_pages),
	RV_COUNTER(donated_pages),
	RV_COUNTER(host_tables),
	RV_COUNTER(el2_tables),
	RV_COUNTER(free_tables),
	RV_COUNTER(stage2_invalidations),
	RV_COUNTER(el2_invalidations),
	RV_COUNTER(faults_resolved),
	RV_COUNTER(faults_denied),
	RV_COUNTER(evictions),
	RV_COUNTER(smcs_forwarded),
	RV_COUNTER(smcs_refused),
	RV_COUNTER(vm_pages),
	RV_COUNTER(host_lent_pages),
	RV_COUNTER(guest_private_pages),
	RV_COUNTER(guest_offered_pages),
	RV_COUNTER(guest_claimed_pages),
};

static struct dentry *rv_debugfs;

static void rv_statistics_print(struct seq_file *seq, const struct ravelin_statistics *statistics)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(rv_counters); i++)
		seq_printf(seq, "%s %llu\n", rv_counters[i].name,
			   *(const u64 *)((const void *)statistics + rv_counters[i].offset));
	for (i = 0; i < RAVELIN_CALL_COUNTERS; i++)
		seq_printf(seq, "calls[%#x] %llu\n", i, statistics->calls[i]);
}

static int rv_statistics_show(struct seq_file *seq, void *unused)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	struct rv_result result;
	phys_addr_t address;
	long status;

	if (!page)
		return -ENOMEM;
	address = page_to_phys(page);
	status = rv_hyp(RAVELIN_CALL_SHARE, NULL, address, 1);
	if (status)
		goto free;
	status = rv_hyp(RAVELIN_CALL_STATISTICS, &result, address);
	/* What a newer hypervisor adds comes behind what is known here. */
	if (!status && result.x1 >= sizeof(struct ravelin_statistics))
		rv_statistics_print(seq, page_address(page));
	/* A page that the hypervisor keeps is not the allocator's any more. */
	if (WARN_ON_ONCE(rv_hyp(RAVELIN_CALL_UNSHARE, NULL, address, 1)))
		return -EIO;
free:
	__free_page(page);
	return rv_errno(status);
}
DEFINE_SHOW_ATTRIBUTE(rv_statistics);

void rv_debugfs_init(void)
{
	rv_debugfs = debugfs_create_dir("ravelin", NULL);
	debugfs_create_file("statistics", 0400, rv_debugfs, NULL, &rv_statistics_fops);
}

void rv_debugfs_exit(void)
{
	debugfs_remove(rv_debugfs);
}
