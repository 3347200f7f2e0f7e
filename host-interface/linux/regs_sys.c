// SPDX-License-Identifier: GPL-2.0-only
/*
 * System registers that a guest has. Which those are, and what they hold at first, the hypervisor
 * knows: it is asked when the module is loaded. So userspace can see the guest's ID registers
 * before there is a guest.
 */
#include <asm/sysreg.h>

#include "regs.h"

#define RV_ENCODING(op0, op1, crn, crm, op2) \
	(RAVELIN_REGISTER_SYSTEM((op0), (op1), (crn), (crm), (op2)))

/* All 64 ID registers of EL1: CRn 0, CRm 0 to 7. */
#define RV_FIRST_ID	RV_ENCODING(3, 0, 0, 0, 0)
#define RV_LAST_ID	RV_ENCODING(3, 0, 0, 7, 7)

/* What else a guest may have. */
static const u16 rv_candidates[] = {
	RV_ENCODING(3, 0, 1, 0, 0),	/* SCTLR_EL1 */
	RV_ENCODING(3, 0, 1, 0, 1),	/* ACTLR_EL1 */
	RV_ENCODING(3, 0, 1, 0, 2),	/* CPACR_EL1 */
	RV_ENCODING(3, 0, 1, 0, 3),	/* SCTLR2_EL1 */
	RV_ENCODING(3, 0, 2, 0, 0),	/* TTBR0_EL1 */
	RV_ENCODING(3, 0, 2, 0, 1),	/* TTBR1_EL1 */
	RV_ENCODING(3, 0, 2, 0, 2),	/* TCR_EL1 */
	RV_ENCODING(3, 0, 2, 0, 3),	/* TCR2_EL1 */
	RV_ENCODING(3, 0, 2, 1, 0),	/* APIAKeyLo_EL1 and the other keys */
	RV_ENCODING(3, 0, 2, 1, 1),
	RV_ENCODING(3, 0, 2, 1, 2),
	RV_ENCODING(3, 0, 2, 1, 3),
	RV_ENCODING(3, 0, 2, 2, 0),
	RV_ENCODING(3, 0, 2, 2, 1),
	RV_ENCODING(3, 0, 2, 2, 2),
	RV_ENCODING(3, 0, 2, 2, 3),
	RV_ENCODING(3, 0, 2, 3, 0),
	RV_ENCODING(3, 0, 2, 3, 1),
	RV_ENCODING(3, 0, 5, 1, 0),	/* AFSR0_EL1 */
	RV_ENCODING(3, 0, 5, 1, 1),	/* AFSR1_EL1 */
	RV_ENCODING(3, 0, 5, 2, 0),	/* ESR_EL1 */
	RV_ENCODING(3, 0, 6, 0, 0),	/* FAR_EL1 */
	RV_ENCODING(3, 0, 7, 4, 0),	/* PAR_EL1 */
	RV_ENCODING(3, 0, 10, 2, 0),	/* MAIR_EL1 */
	RV_ENCODING(3, 0, 10, 2, 2),	/* PIRE0_EL1 */
	RV_ENCODING(3, 0, 10, 2, 3),	/* PIR_EL1 */
	RV_ENCODING(3, 0, 10, 2, 4),	/* POR_EL1 */
	RV_ENCODING(3, 0, 10, 3, 0),	/* AMAIR_EL1 */
	RV_ENCODING(3, 0, 12, 0, 0),	/* VBAR_EL1 */
	RV_ENCODING(3, 0, 12, 1, 1),	/* DISR_EL1 */
	RV_ENCODING(3, 0, 13, 0, 1),	/* CONTEXTIDR_EL1 */
	RV_ENCODING(3, 0, 13, 0, 4),	/* TPIDR_EL1 */
	RV_ENCODING(3, 0, 14, 1, 0),	/* CNTKCTL_EL1 */
	RV_ENCODING(3, 1, 0, 0, 1),	/* CLIDR_EL1 */
	RV_ENCODING(3, 2, 0, 0, 0),	/* CSSELR_EL1 */
	RV_ENCODING(3, 3, 0, 0, 1),	/* CTR_EL0 */
	RV_ENCODING(3, 3, 10, 2, 4),	/* POR_EL0 */
	RV_ENCODING(3, 3, 13, 0, 2),	/* TPIDR_EL0 */
	RV_ENCODING(3, 3, 13, 0, 3),	/* TPIDRRO_EL0 */
	RV_ENCODING(3, 3, 14, 2, 1),	/* CNTP_CTL_EL0 */
	RV_ENCODING(3, 3, 14, 2, 2),	/* CNTP_CVAL_EL0 */
	RV_CNTVCT,
	RV_ENCODING(3, 3, 14, 3, 1),	/* CNTV_CTL_EL0 */
	RV_CNTV_CVAL,
};

struct rv_sysreg rv_sysregs[RV_MAX_SYSREGS];
unsigned int rv_nr_sysregs;

/* Whether a register says what there is, and cannot be made to say something else. */
static bool rv_sysreg_fixed(u16 number)
{
	/* CRn 0, but for CSSELR_EL1 */
	return !(number & RV_ENCODING(0, 0, 15, 0, 0)) && number != RV_ENCODING(3, 2, 0, 0, 0);
}

/*
 * Guests have SVE where the CPU has it, but userspace cannot get at its registers. So it is shown
 * none: VMMs that see it want to save it.
 */
static u64 rv_sysreg_shown(u16 number, u64 value)
{
	switch (number) {
	case RV_ENCODING(3, 0, 0, 4, 0):	/* ID_AA64PFR0_EL1 */
		return value & ~ID_AA64PFR0_EL1_SVE_MASK;
	case RV_ENCODING(3, 0, 0, 4, 4):	/* ID_AA64ZFR0_EL1 */
		return 0;
	case RV_CNTVCT:				/* runs, and is at 0 when a VM begins */
		return 0;
	default:
		return value;
	}
}

static void rv_sysreg_look(u64 attributes, u16 number)
{
	struct rv_sysreg *reg = &rv_sysregs[rv_nr_sysregs];
	struct rv_result result;

	if (rv_nr_sysregs == RV_MAX_SYSREGS ||
	    rv_hyp(RAVELIN_CALL_REGISTER_RESET_VALUE, &result, attributes, number))
		return;
	reg->number = number;
	reg->fixed = rv_sysreg_fixed(number);
	reg->reset = rv_sysreg_shown(number, result.x1);
	rv_nr_sysregs++;
}

void rv_sysregs_setup(u64 attributes)
{
	u32 number;
	int i;

	for (number = RV_FIRST_ID; number <= RV_LAST_ID; number++)
		rv_sysreg_look(attributes, number);
	for (i = 0; i < ARRAY_SIZE(rv_candidates); i++)
		rv_sysreg_look(attributes, rv_candidates[i]);
}

u64 rv_sysreg_reset(unsigned int index, u32 vcpu)
{
	u64 value = rv_sysregs[index].reset;

	/* As the hypervisor numbers them: 16 in a cluster. */
	if (rv_sysregs[index].number == RV_MPIDR)
		value |= (vcpu / 16) << 8 | vcpu % 16;
	return value;
}
