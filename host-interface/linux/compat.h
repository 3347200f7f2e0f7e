/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that the module is built for, 6.12 and 7.3.
 */
#ifndef RV_COMPAT_H
#define RV_COMPAT_H

#include <linux/hrtimer.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/version.h>

#include <asm/neon.h>

#if KERNEL_VERSION(6, 13, 0) > LINUX_VERSION_CODE
static inline void rv_hrtimer_setup(struct hrtimer *timer,
				    enum hrtimer_restart (*function)(struct hrtimer *),
				    clockid_t clock, enum hrtimer_mode mode)
{
	hrtimer_init(timer, clock, mode);
	timer->function = function;
}
#else
#define rv_hrtimer_setup hrtimer_setup
#endif

/* Takes the CPU out of streaming SVE mode, which the hypervisor refuses to run guests in. */
static inline void rv_leave_streaming_mode(void)
{
#if KERNEL_VERSION(6, 19, 0) > LINUX_VERSION_CODE
	kernel_neon_begin();
	kernel_neon_end();
#else
	struct user_fpsimd_state state;

	kernel_neon_begin(&state);
	kernel_neon_end(&state);
#endif
}

#if KERNEL_VERSION(6, 17, 0) > LINUX_VERSION_CODE
#include <linux/pfn_t.h>

#define rv_insert_pfn_pmd(vmf, pfn, write) vmf_insert_pfn_pmd(vmf, __pfn_to_pfn_t(pfn, 0), write)
#else
#define rv_insert_pfn_pmd vmf_insert_pfn_pmd
#endif

#ifndef kzalloc_obj
#define kzalloc_obj(obj, gfp) kzalloc(sizeof(obj), gfp)
#endif

#endif /* RV_COMPAT_H */
