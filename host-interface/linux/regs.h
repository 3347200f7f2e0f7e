/* SPDX-License-Identifier: GPL-2.0-only */
/* Between regs.c and regs_sys.c. */
#ifndef RV_REGS_H
#define RV_REGS_H

#include "ravelin_kvm.h"

#define RV_MAX_SYSREGS	128

/* By the hypervisor's numbers, which are the encodings. */
#define RV_MPIDR	RAVELIN_REGISTER_SYSTEM(3, 0, 0, 0, 5)
#define RV_CNTVCT	RAVELIN_REGISTER_SYSTEM(3, 3, 14, 0, 2)
#define RV_CNTV_CVAL	RAVELIN_REGISTER_SYSTEM(3, 3, 14, 3, 2)

struct rv_sysreg {
	u16 number;
	bool fixed;
	u64 reset;
};

extern struct rv_sysreg rv_sysregs[RV_MAX_SYSREGS];
extern unsigned int rv_nr_sysregs;

/* What a register holds when the vCPU of this index starts. */
u64 rv_sysreg_reset(unsigned int index, u32 vcpu);

#endif /* RV_REGS_H */
