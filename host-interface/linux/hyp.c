// SPDX-License-Identifier: GPL-2.0-only
/*
 * Calls to the hypervisor.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/arm-smccc.h>
#include <linux/errno.h>
#include <linux/of.h>
#include <linux/printk.h>

#include <asm/virt.h>

#include "hyp.h"

/* Offered calls: bit n for the one with number 0xc6001000 + n. */
static u64 rv_calls;

long __rv_hyp(u32 fn, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6,
	      struct rv_result *result)
{
	struct arm_smccc_1_2_regs regs = {
		.a0 = fn,
		.a1 = a1,
		.a2 = a2,
		.a3 = a3,
		.a4 = a4,
		.a5 = a5,
		.a6 = a6,
	};

	arm_smccc_1_2_hvc(&regs, &regs);
	if (result) {
		result->x1 = regs.a1;
		result->x2 = regs.a2;
		result->x3 = regs.a3;
	}
	return (long)regs.a0;
}

int rv_errno(long status)
{
	switch (status) {
	case RAVELIN_STATUS_SUCCESS:
		return 0;
	case RAVELIN_STATUS_NOT_SUPPORTED:
		return -EOPNOTSUPP;
	case RAVELIN_STATUS_RESERVED:
	case RAVELIN_STATUS_INVALID:
	case RAVELIN_STATUS_UNALIGNED:
	case RAVELIN_STATUS_OVERFLOW:
	case RAVELIN_STATUS_TOO_LARGE:
		return -EINVAL;
	case RAVELIN_STATUS_NOT_RAM:
		return -EFAULT;
	case RAVELIN_STATUS_DENIED:
	case RAVELIN_STATUS_WRONG_STATE:
		return -EPERM;
	case RAVELIN_STATUS_BUSY:
		return -EBUSY;
	case RAVELIN_STATUS_NO_MEMORY:
	case RAVELIN_STATUS_NEEDS_TABLES:
		return -ENOMEM;
	case RAVELIN_STATUS_LIMIT:
		return -ENOSPC;
	case RAVELIN_STATUS_BAD_HANDLE:
		return -EIO;
	case RAVELIN_STATUS_EXISTS:
		return -EEXIST;
	case RAVELIN_STATUS_ABSENT:
		return -ENOENT;
	case RAVELIN_STATUS_POISONED:
		return -EHWPOISON;
	case RAVELIN_STATUS_NOT_OFFERED:
		return -EACCES;
	default:
		return -EIO;
	}
}

/* Whether the device tree says so: without a hypervisor HVC is an undefined instruction. */
static bool rv_hyp_in_device_tree(void)
{
	struct device_node *parent, *node;
	bool found;

	parent = of_find_node_by_path("/reserved-memory");
	node = of_get_child_by_name(parent, "ravelin");
	found = node;
	of_node_put(node);
	of_node_put(parent);
	return found;
}

int rv_hyp_probe(void)
{
	struct rv_result uid, version;
	long word0, major;

	if (is_kernel_in_hyp_mode() || !rv_hyp_in_device_tree())
		return -ENODEV;
	word0 = rv_hyp(RAVELIN_CALL_UID, &uid);
	if ((u32)word0 != RAVELIN_UID_0 || (u32)uid.x1 != RAVELIN_UID_1 ||
	    (u32)uid.x2 != RAVELIN_UID_2 || (u32)uid.x3 != RAVELIN_UID_3)
		return -ENODEV;

	major = rv_hyp(RAVELIN_CALL_REVISION, &version);
	if (major != RAVELIN_VERSION_MAJOR || version.x1 < RAVELIN_VERSION_MINOR) {
		pr_err("the hypervisor's interface is %ld.%llu, this module needs %d.%d\n",
		       major, version.x1, RAVELIN_VERSION_MAJOR, RAVELIN_VERSION_MINOR);
		return -ENODEV;
	}

	if (rv_hyp(RAVELIN_CALL_FEATURES, &version, 0))
		return -ENODEV;
	rv_calls = version.x1;
	return 0;
}

bool rv_hyp_offers(u32 fn)
{
	return rv_calls & BIT_ULL(fn & 0x3f);
}
