// SPDX-License-Identifier: GPL-2.0-only
/*
 * Registers of a vCPU. While the VM is new they are known here only, and the first KVM_RUN hands
 * them to the hypervisor. A protected guest's registers are nobody else's business from then on.
 */

#include <linux/log2.h>
#include <linux/overflow.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include <asm/ptrace.h>

#include "regs.h"

#define RV_RESET_PSTATE	(PSR_MODE_EL1h | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT | PSR_D_BIT)
#define RV_PSCI_1_1	0x10001

/* In units of 4 bytes, as identifiers of core registers count; also the hypervisor's numbers. */
#define RV_CORE(field)	KVM_REG_ARM_CORE_REG(field)
#define RV_FIRST_SPSR	RV_CORE(spsr[0])
#define RV_FIRST_V	RV_CORE(fp_regs.vregs[0])
#define RV_FPSR		RV_CORE(fp_regs.fpsr)
#define RV_FPCR		RV_CORE(fp_regs.fpcr)

struct rv_regs {
	struct kvm_regs core;
	u64 sys[];		/* as rv_sysregs */
};

/* A register of a vCPU, found by its identifier. */
struct rv_reg {
	u32 number;		/* the hypervisor's, unless it is fixed */
	size_t size;
	void *shadow;		/* what it holds while the VM is new */
	bool fixed;		/* it is always what its shadow is */
};

/* The firmware's version is no register that anybody could change. */
static u64 rv_psci_version = RV_PSCI_1_1;

int rv_regs_init(struct rv_vcpu *vcpu)
{
	vcpu->regs = kzalloc(struct_size(vcpu->regs, sys, rv_nr_sysregs), GFP_KERNEL_ACCOUNT);
	return vcpu->regs ? 0 : -ENOMEM;
}

void rv_regs_release(struct rv_vcpu *vcpu)
{
	kfree(vcpu->regs);
}

void rv_regs_reset(struct rv_vcpu *vcpu)
{
	struct rv_regs *regs = vcpu->regs;
	unsigned int i;

	memset(&regs->core, 0, sizeof(regs->core));
	regs->core.regs.pstate = RV_RESET_PSTATE;
	for (i = 0; i < rv_nr_sysregs; i++)
		regs->sys[i] = rv_sysreg_reset(i, vcpu->id);
}

u64 rv_regs_pc(struct rv_vcpu *vcpu)
{
	return vcpu->regs->core.regs.pc;
}

u64 rv_regs_x0(struct rv_vcpu *vcpu)
{
	return vcpu->regs->core.regs.regs[0];
}

/* Size of the core register at an offset. 0 if none begins there. */
static size_t rv_core_size(u32 offset)
{
	if (offset < RV_FIRST_SPSR + 2 * KVM_NR_SPSR)
		return offset % 2 ? 0 : sizeof(u64);
	if (offset >= RV_FIRST_V && offset < RV_FPSR)
		return offset % 4 ? 0 : sizeof(__uint128_t);
	return offset == RV_FPSR || offset == RV_FPCR ? sizeof(u32) : 0;
}

static int rv_find_core(struct rv_vcpu *vcpu, u32 offset, struct rv_reg *reg)
{
	if (offset >= sizeof(struct kvm_regs) / sizeof(u32))
		return -ENOENT;
	reg->size = rv_core_size(offset);
	reg->shadow = (u32 *)&vcpu->regs->core + offset;
	reg->number = offset;
	/* Of the SPSRs of modes that only AArch32 has, nothing is kept. */
	if (offset > RV_FIRST_SPSR && offset < RV_FIRST_V)
		reg->fixed = true;
	return 0;
}

/* The interface has the encodings of these two the wrong way round. */
static u32 rv_swap_timer(u32 number)
{
	switch (number) {
	case RV_CNTVCT:
		return RV_CNTV_CVAL;
	case RV_CNTV_CVAL:
		return RV_CNTVCT;
	default:
		return number;
	}
}

static int rv_find_sys(struct rv_vcpu *vcpu, u32 encoding, struct rv_reg *reg)
{
	u32 number = rv_swap_timer(encoding);
	unsigned int i;

	for (i = 0; i < rv_nr_sysregs; i++) {
		if (rv_sysregs[i].number != number)
			continue;
		reg->number = number;
		reg->size = sizeof(u64);
		reg->shadow = &vcpu->regs->sys[i];
		reg->fixed = rv_sysregs[i].fixed;
		return 0;
	}
	return -ENOENT;
}

static int rv_find_reg(struct rv_vcpu *vcpu, u64 id, struct rv_reg *reg)
{
	u64 low = id & 0xffff;
	int ret = -ENOENT;

	*reg = (struct rv_reg){};
	if ((id & ~KVM_REG_SIZE_MASK) >> 28 != KVM_REG_ARM64 >> 28)
		return -EINVAL;
	switch (id & KVM_REG_ARM_COPROC_MASK) {
	case KVM_REG_ARM_CORE:
		ret = rv_find_core(vcpu, low, reg);
		break;
	case KVM_REG_ARM64_SYSREG:
		ret = rv_find_sys(vcpu, low, reg);
		break;
	case KVM_REG_ARM_FW:
		if (id != KVM_REG_ARM_PSCI_VERSION)
			break;
		*reg = (struct rv_reg){
			.size = sizeof(u64),
			.shadow = &rv_psci_version,
			.fixed = true,
		};
		return 0;
	}
	if (ret)
		return ret;
	return reg->size && reg->size == KVM_REG_SIZE(id) ? 0 : -EINVAL;
}

/* vm->lock is held. Registers of more than 64 bits have a number for each half. */
static int rv_read_reg(struct rv_vcpu *vcpu, const struct rv_reg *reg, u64 value[2])
{
	struct rv_vm *vm = vcpu->vm;
	struct rv_result result;
	size_t done;
	long status;

	if (vm->phase == RV_NEW || reg->fixed) {
		memcpy(value, reg->shadow, reg->size);
		return 0;
	}
	for (done = 0; done < reg->size; done += sizeof(u64)) {
		status = rv_hyp(RAVELIN_CALL_VCPU_GET_REGISTER, &result, vm->handle, vcpu->id,
				reg->number + done / sizeof(u32));
		if (status)
			return rv_errno(status);
		value[done / sizeof(u64)] = result.x1;
	}
	return 0;
}

static int rv_send_reg(struct rv_vcpu *vcpu, const struct rv_reg *reg, const u64 value[2])
{
	size_t done;
	long status;

	for (done = 0; done < reg->size; done += sizeof(u64)) {
		status = rv_hyp(RAVELIN_CALL_VCPU_SET_REGISTER, NULL, vcpu->vm->handle, vcpu->id,
				reg->number + done / sizeof(u32), value[done / sizeof(u64)]);
		if (status)
			return rv_errno(status);
	}
	return 0;
}

/* Of a protected guest, the host says where it starts. */
static bool rv_reg_open(const struct rv_vcpu *vcpu, const struct rv_reg *reg)
{
	if (vcpu->vm->kind == RV_ORDINARY)
		return true;
	return !vcpu->id &&
	       (reg->number == RV_CORE(regs.pc) || reg->number == RV_CORE(regs.regs[0]));
}

static bool rv_reg_accepts(const struct rv_reg *reg, u64 value)
{
	if (reg->number != RV_CORE(regs.pstate))
		return true;
	switch (value & (PSR_MODE_MASK | PSR_MODE32_BIT)) {
	case PSR_MODE_EL0t:
	case PSR_MODE_EL1t:
	case PSR_MODE_EL1h:
		return true;
	default:
		return false;
	}
}

static int rv_write_reg(struct rv_vcpu *vcpu, const struct rv_reg *reg, const u64 value[2])
{
	u64 now[2] = {};
	int ret;

	if (!rv_reg_accepts(reg, value[0]))
		return -EINVAL;
	if (reg->fixed || !rv_reg_open(vcpu, reg)) {
		ret = rv_read_reg(vcpu, reg, now);
		if (ret || !memcmp(now, value, sizeof(now)))
			return ret;
		return reg->fixed ? -EINVAL : -EPERM;
	}
	if (vcpu->vm->phase == RV_LIVE)
		return rv_send_reg(vcpu, reg, value);
	memcpy(reg->shadow, value, reg->size);
	return 0;
}

/* Whether registers of a VM that is not new can still be told: vm->lock is held. */
static int rv_regs_reachable(const struct rv_vm *vm)
{
	if (vm->phase == RV_DEAD)
		return -EIO;
	return vm->phase == RV_LIVE && vm->kind != RV_ORDINARY ? -EPERM : 0;
}

long rv_get_one_reg(struct rv_vcpu *vcpu, const struct kvm_one_reg *user)
{
	struct rv_vm *vm = vcpu->vm;
	u64 value[2] = {};
	struct rv_reg reg;
	int ret;

	ret = rv_find_reg(vcpu, user->id, &reg);
	if (ret)
		return ret;
	mutex_lock(&vm->lock);
	ret = rv_regs_reachable(vm) ?: rv_read_reg(vcpu, &reg, value);
	mutex_unlock(&vm->lock);
	if (ret)
		return ret;
	return copy_to_user(u64_to_user_ptr(user->addr), value, reg.size) ? -EFAULT : 0;
}

long rv_set_one_reg(struct rv_vcpu *vcpu, const struct kvm_one_reg *user)
{
	struct rv_vm *vm = vcpu->vm;
	u64 value[2] = {};
	struct rv_reg reg;
	int ret;

	ret = rv_find_reg(vcpu, user->id, &reg);
	if (ret)
		return ret;
	if (copy_from_user(value, u64_to_user_ptr(user->addr), reg.size))
		return -EFAULT;
	mutex_lock(&vm->lock);
	ret = rv_regs_reachable(vm) ?: rv_write_reg(vcpu, &reg, value);
	mutex_unlock(&vm->lock);
	return ret;
}

/* Tells the hypervisor of a core register that is not what it is at first. */
static int rv_load_core(struct rv_vcpu *vcpu, u32 offset)
{
	u64 value[2] = {}, reset[2] = {};
	struct rv_reg reg = {};
	int ret;

	ret = rv_find_core(vcpu, offset, &reg);
	if (ret || !reg.size || reg.fixed)
		return ret;
	if (offset == RV_CORE(regs.pstate))
		reset[0] = RV_RESET_PSTATE;
	memcpy(value, reg.shadow, reg.size);
	return memcmp(value, reset, sizeof(value)) ? rv_send_reg(vcpu, &reg, value) : 0;
}

int rv_regs_load(struct rv_vcpu *vcpu)
{
	u32 offset;
	unsigned int i;
	int ret = 0;

	/* The seal says all that there is to say of a protected guest. */
	if (vcpu->vm->kind != RV_ORDINARY || !vcpu->initialized)
		return 0;
	for (offset = 0; offset <= RV_FPCR && !ret; offset++)
		ret = rv_load_core(vcpu, offset);
	for (i = 0; i < rv_nr_sysregs && !ret; i++) {
		struct rv_reg reg = { .number = rv_sysregs[i].number, .size = sizeof(u64) };
		u64 value[2] = { vcpu->regs->sys[i] };

		if (value[0] != rv_sysreg_reset(i, vcpu->id))
			ret = rv_send_reg(vcpu, &reg, value);
	}
	return ret;
}

static u64 rv_core_id(u32 offset)
{
	/* The size is in the identifier as a power of two. */
	return KVM_REG_ARM64 | KVM_REG_ARM_CORE | offset |
	       (u64)ilog2(rv_core_size(offset)) << KVM_REG_SIZE_SHIFT;
}

/* Writes the identifiers to @ids unless it is NULL, and counts them. */
static int rv_list_regs(u64 __user *ids, u64 *count)
{
	u32 offset;
	u64 n = 0;
	unsigned int i;

	for (offset = 0; offset <= RV_FPCR; offset++) {
		if (!rv_core_size(offset))
			continue;
		if (ids && put_user(rv_core_id(offset), ids + n))
			return -EFAULT;
		n++;
	}
	if (ids && put_user(KVM_REG_ARM_PSCI_VERSION, ids + n))
		return -EFAULT;
	n++;
	for (i = 0; i < rv_nr_sysregs; i++) {
		u64 id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG |
			 rv_swap_timer(rv_sysregs[i].number);

		if (ids && put_user(id, ids + n))
			return -EFAULT;
		n++;
	}
	*count = n;
	return 0;
}

long rv_get_reg_list(struct kvm_reg_list __user *list)
{
	u64 room, count = 0;

	rv_list_regs(NULL, &count);
	if (get_user(room, &list->n) || put_user(count, &list->n))
		return -EFAULT;
	return room < count ? -E2BIG : rv_list_regs(list->reg, &count);
}
