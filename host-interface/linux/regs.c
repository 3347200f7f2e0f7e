// SPDX-License-Identifier: GPL-2.0-only
/*
 * Registers of a vCPU. While the VM is new they are known here only; the first KVM_RUN hands them
 * to the hypervisor. A protected guest's registers are nobody else's business from then on.
 */

#include <linux/slab.h>
#include <linux/uaccess.h>

#include <asm/ptrace.h>

#include "ravelin_kvm.h"

/* Of the most registers that one identifier may stand for. */
#define RV_CORE_UNITS	(sizeof(struct kvm_regs) / sizeof(__u32))

struct rv_regs {
	struct kvm_regs core;
};

int rv_regs_init(struct rv_vcpu *vcpu)
{
	vcpu->regs = kzalloc(sizeof(*vcpu->regs), GFP_KERNEL_ACCOUNT);
	return vcpu->regs ? 0 : -ENOMEM;
}

void rv_regs_release(struct rv_vcpu *vcpu)
{
	kfree(vcpu->regs);
}

void rv_regs_reset(struct rv_vcpu *vcpu)
{
	memset(vcpu->regs, 0, sizeof(*vcpu->regs));
	vcpu->regs->core.regs.pstate =
		PSR_MODE_EL1h | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT | PSR_D_BIT;
}

u64 rv_regs_pc(struct rv_vcpu *vcpu)
{
	return vcpu->regs->core.regs.pc;
}

u64 rv_regs_x0(struct rv_vcpu *vcpu)
{
	return vcpu->regs->core.regs.regs[0];
}

/* Size of the core register that begins at an offset in units of 4 bytes. 0 if none does. */
static size_t rv_core_size(u64 offset)
{
	switch (offset) {
	case KVM_REG_ARM_CORE_REG(regs.regs[0]) ... KVM_REG_ARM_CORE_REG(spsr[KVM_NR_SPSR - 1]):
		return offset % 2 ? 0 : sizeof(__u64);
	case KVM_REG_ARM_CORE_REG(fp_regs.vregs[0]) ... KVM_REG_ARM_CORE_REG(fp_regs.vregs[31]):
		return (offset - KVM_REG_ARM_CORE_REG(fp_regs.vregs[0])) % 4 ? 0 : sizeof(__uint128_t);
	case KVM_REG_ARM_CORE_REG(fp_regs.fpsr):
	case KVM_REG_ARM_CORE_REG(fp_regs.fpcr):
		return sizeof(__u32);
	default:
		return 0;
	}
}

static void *rv_core_reg(struct rv_vcpu *vcpu, u64 id)
{
	u64 offset = id & ~(KVM_REG_ARCH_MASK | KVM_REG_SIZE_MASK | KVM_REG_ARM_CORE);
	size_t size = rv_core_size(offset);

	if (!size || KVM_REG_SIZE(id) != size)
		return NULL;
	return (__u32 *)&vcpu->regs->core + offset;
}

int rv_regs_load(struct rv_vcpu *vcpu)
{
	return 0;
}

long rv_get_one_reg(struct rv_vcpu *vcpu, const struct kvm_one_reg *reg)
{
	void *value = rv_core_reg(vcpu, reg->id);

	if (!value)
		return -ENOENT;
	return copy_to_user((void __user *)reg->addr, value, KVM_REG_SIZE(reg->id)) ? -EFAULT : 0;
}

long rv_set_one_reg(struct rv_vcpu *vcpu, const struct kvm_one_reg *reg)
{
	void *value = rv_core_reg(vcpu, reg->id);

	if (!value)
		return -ENOENT;
	return copy_from_user(value, (void __user *)reg->addr, KVM_REG_SIZE(reg->id)) ? -EFAULT : 0;
}

long rv_get_reg_list(struct kvm_reg_list __user *list)
{
	return -EINVAL;
}
