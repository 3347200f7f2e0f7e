/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Calls to the hypervisor.
 */
#ifndef RV_HYP_H
#define RV_HYP_H

#include <linux/types.h>

#include "ravelin.h"

/* What a call returns besides its status. */
struct rv_result {
	u64 x1, x2, x3;
};

/*
 * Calls the hypervisor. Returns a RAVELIN_STATUS_*. @result may be NULL. Works in any context.
 * Like SMCCC, it takes as many arguments as the call has; see rv_hyp() for fewer than six.
 */
long __rv_hyp(u32 fn, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6,
	      struct rv_result *result);

#define __RV_HYP(fn, result, a1, a2, a3, a4, a5, a6, ...) \
	__rv_hyp(fn, a1, a2, a3, a4, a5, a6, result)

/* rv_hyp(function, result or NULL, arguments...) */
#define rv_hyp(fn, result, ...) __RV_HYP(fn, result, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)

/* The errno for a status. */
int rv_errno(long status);

/* 0 if the hypervisor is there and of a version that this module knows, or an errno. */
int rv_hyp_probe(void);

/* Whether it offers a call. */
bool rv_hyp_offers(u32 fn);

#endif /* RV_HYP_H */
