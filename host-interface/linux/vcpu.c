// SPDX-License-Identifier: GPL-2.0-only
/*
 * vCPUs: running, waiting, waking. The ioctls are in vcpu_ioctl.c.
 */

#include <linux/atomic.h>
#include <linux/hrtimer.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/vtime.h>

#include <asm/arch_timer.h>

#include "ravelin_kvm.h"

/* A vCPU that sleeps longer than this looks at the time again. */
#define RV_LONGEST_SLEEP_S	3600

/* Instead of a status: the vCPU was not run, for its thread has something else to do. */
#define RV_STAYED		1

/*
 * How a CPU is interrupted. There is one for each CPU, not for each vCPU: if it is pending, the CPU
 * has yet to take an interrupt, and what runs there leaves its guest.
 */
struct rv_kick {
	call_single_data_t csd;
	atomic_t pending;	/* csd is somebody's, until the CPU has taken the interrupt */
};

static DEFINE_PER_CPU(struct rv_kick, rv_kicks);

/* The interrupt is all. */
static void rv_kick_taken(void *info)
{
	struct rv_kick *kick = info;

	atomic_set_release(&kick->pending, 0);
}

static void rv_kick_cpu(int cpu)
{
	struct rv_kick *kick = per_cpu_ptr(&rv_kicks, cpu);
	unsigned long flags;

	/* Others rely on a kick that is pending, which must not wait for this thread's turn. */
	local_irq_save(flags);
	if (!atomic_xchg(&kick->pending, 1) && smp_call_function_single_async(cpu, &kick->csd))
		/* The CPU has gone, and nothing runs there. */
		atomic_set_release(&kick->pending, 0);
	local_irq_restore(flags);
}

void rv_vcpu_wake(struct rv_vcpu *vcpu)
{
	int cpu;

	/* What it is woken for comes first, for who clears woken and then looks. */
	smp_mb();
	WRITE_ONCE(vcpu->woken, true);
	/* Pairs with the one in rv_vcpu_enter(). */
	smp_mb();
	rcuwait_wake_up(&vcpu->wait);
	cpu = READ_ONCE(vcpu->cpu);
	if (cpu >= 0)
		rv_kick_cpu(cpu);
}

static void rv_wake_word(struct rv_vm *vm, u64 set, u32 base)
{
	struct rv_vcpu *vcpu;

	for (; set; set &= set - 1) {
		vcpu = xa_load(&vm->vcpus, base + __ffs64(set));
		if (vcpu)
			rv_vcpu_wake(vcpu);
	}
}

void rv_vm_wake(struct rv_vm *vm, u64 low, u64 high)
{
	rv_wake_word(vm, low, 0);
	rv_wake_word(vm, high, 64);
}

void rv_vm_wake_all(struct rv_vm *vm)
{
	struct rv_vcpu *vcpu;
	unsigned long id;

	xa_for_each(&vm->vcpus, id, vcpu)
		rv_vcpu_wake(vcpu);
}

static enum hrtimer_restart rv_vcpu_timer(struct hrtimer *timer)
{
	rv_vcpu_wake(container_of(timer, struct rv_vcpu, timer));
	return HRTIMER_NORESTART;
}

/* Nanoseconds until a value of the physical counter. */
static u64 rv_ns_until(u64 deadline)
{
	u32 frequency = arch_timer_get_cntfrq();
	u64 now, seconds;
	u32 rest;

	isb();
	now = read_sysreg(cntpct_el0);
	if (deadline <= now)
		return 0;
	seconds = div_u64_rem(deadline - now, frequency, &rest);
	if (seconds >= RV_LONGEST_SLEEP_S)
		return RV_LONGEST_SLEEP_S * NSEC_PER_SEC;
	return seconds * NSEC_PER_SEC + div_u64(rest * NSEC_PER_SEC, frequency);
}

int rv_vcpu_wait(struct rv_vcpu *vcpu, u64 deadline)
{
	bool timed = deadline != RAVELIN_RUN_NO_DEADLINE;
	int ret;

	if (timed) {
		u64 ns = rv_ns_until(deadline);

		if (!ns)
			return 1;
		hrtimer_start(&vcpu->timer, ns_to_ktime(ns), HRTIMER_MODE_REL);
	}
	ret = rcuwait_wait_event(&vcpu->wait, READ_ONCE(vcpu->woken), TASK_INTERRUPTIBLE);
	if (timed)
		hrtimer_cancel(&vcpu->timer);
	/* A signal is looked at before the next step. */
	if (!ret)
		WRITE_ONCE(vcpu->woken, false);
	/* What it was woken for is looked at next. Pairs with rv_vcpu_wake(). */
	smp_mb();
	return 1;
}

/* Lets another vCPU of the VM run whose thread waits for a CPU. */
static bool rv_yield_to(struct rv_vcpu *other)
{
	struct task_struct *task;
	bool yielded;

	/* A thread that is in KVM_RUN now is there until the end of a grace period. */
	rcu_read_lock();
	task = READ_ONCE(other->task);
	if (task)
		get_task_struct(task);
	rcu_read_unlock();
	if (!task)
		return false;
	yielded = READ_ONCE(other->cpu) < 0 && yield_to(task, true) > 0;
	put_task_struct(task);
	return yielded;
}

void rv_vcpu_yield(struct rv_vcpu *vcpu)
{
	struct rv_vcpu *other;
	unsigned long id;

	/* Those behind it first, so that each gets its turn. */
	xa_for_each_start(&vcpu->vm->vcpus, id, other, vcpu->id + 1) {
		if (rv_yield_to(other))
			return;
	}
	xa_for_each_range(&vcpu->vm->vcpus, id, other, 0, vcpu->id) {
		if (other != vcpu && rv_yield_to(other))
			return;
	}
}

/* Whether the thread has something to do before its vCPU enters the guest. */
static bool rv_vcpu_must_stay(struct rv_vcpu *vcpu)
{
	struct rv_vm *vm = vcpu->vm;

	return signal_pending(current) || need_resched() || READ_ONCE(vm->stopping) ||
	       READ_ONCE(vm->ended) || READ_ONCE(vm->phase) != RV_LIVE;
}

/* Runs the vCPU until it exits. Returns a status, or RV_STAYED. */
static long rv_vcpu_enter(struct rv_vcpu *vcpu)
{
	long status = RV_STAYED;

	local_irq_disable();
	/* Who sees this sees that earlier kicks of the CPU are not pending any more. */
	smp_store_release(&vcpu->cpu, smp_processor_id());
	/*
	 * Who wakes it from here on sees the CPU, or else is seen below. Pairs with
	 * rv_vcpu_wake().
	 */
	smp_mb();
	WRITE_ONCE(vcpu->woken, false);
	/* Whoever wakes it has changed first what is looked at next. */
	smp_mb();
	if (!rv_vcpu_must_stay(vcpu)) {
		vtime_account_guest_enter();
		status = rv_hyp(RAVELIN_CALL_VCPU_RUN, NULL, vcpu->vm->handle, vcpu->id);
		WRITE_ONCE(vcpu->cpu, -1);
		/* The interrupt that ended the run, so that its time is the guest's. */
		local_irq_enable();
		isb();
		local_irq_disable();
		vtime_account_guest_exit();
	}
	WRITE_ONCE(vcpu->cpu, -1);
	local_irq_enable();
	return status;
}

static int rv_vcpu_failed(struct rv_vcpu *vcpu)
{
	vcpu->run->exit_reason = KVM_EXIT_FAIL_ENTRY;
	vcpu->run->fail_entry.hardware_entry_failure_reason = RAVELIN_EXIT_FAILED;
	vcpu->run->fail_entry.cpu = raw_smp_processor_id();
	return 0;
}

/* > 0 to go on, 0 to return to userspace, or an errno. */
static int rv_vcpu_step(struct rv_vcpu *vcpu)
{
	struct rv_vm *vm = vcpu->vm;
	long status;

	cond_resched();
	if (signal_pending(current)) {
		vcpu->run->exit_reason = KVM_EXIT_INTR;
		return -EINTR;
	}
	if (READ_ONCE(vm->phase) == RV_DEAD)
		return -EIO;
	if (READ_ONCE(vcpu->failed))
		return rv_vcpu_failed(vcpu);
	if (READ_ONCE(vm->stopping) || READ_ONCE(vm->ended))
		return rv_vcpu_wait(vcpu, RAVELIN_RUN_NO_DEADLINE);
	if (READ_ONCE(vm->phase) == RV_NEW) {
		if (vcpu->starts_off)
			return rv_vcpu_wait(vcpu, RAVELIN_RUN_NO_DEADLINE);
		return rv_vm_finalize(vm) ?: 1;
	}

	status = rv_vcpu_enter(vcpu);
	switch (status) {
	case RAVELIN_STATUS_SUCCESS:
		vcpu->powered = true;
		return rv_handle_exit(vcpu);
	case RV_STAYED:
		return 1;
	case RAVELIN_STATUS_BUSY:
		rv_leave_streaming_mode();
		return 1;
	case RAVELIN_STATUS_WRONG_STATE:
	case RAVELIN_STATUS_BAD_HANDLE:
		/* It is off, or its VM has just ended: then it has been woken. */
		vcpu->powered = false;
		return rv_vcpu_wait(vcpu, RAVELIN_RUN_NO_DEADLINE);
	default:
		return rv_errno(status);
	}
}

int rv_vcpu_run(struct rv_vcpu *vcpu)
{
	int ret;

	if (!vcpu->initialized)
		return -ENOEXEC;
	ret = rv_complete_exit(vcpu);
	if (ret)
		return ret;
	if (READ_ONCE(vcpu->run->immediate_exit__unsafe))
		return -EINTR;

	vcpu->run->exit_reason = KVM_EXIT_UNKNOWN;
	WRITE_ONCE(vcpu->task, current);
	do {
		ret = rv_vcpu_step(vcpu);
	} while (ret > 0);
	WRITE_ONCE(vcpu->task, NULL);
	return ret;
}

struct rv_vcpu *rv_vcpu_alloc(struct rv_vm *vm, u32 id)
{
	struct rv_vcpu *vcpu;

	vcpu = kzalloc_obj(*vcpu, GFP_KERNEL_ACCOUNT);
	if (!vcpu)
		return NULL;
	vcpu->vm = vm;
	vcpu->id = id;
	vcpu->cpu = -1;
	mutex_init(&vcpu->lock);
	rcuwait_init(&vcpu->wait);
	rv_hrtimer_setup(&vcpu->timer, rv_vcpu_timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	vcpu->run = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	vcpu->el2 = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	if (!vcpu->run || !vcpu->el2 || rv_regs_init(vcpu)) {
		rv_vcpu_free(vcpu);
		return NULL;
	}
	return vcpu;
}

void rv_vcpu_free(struct rv_vcpu *vcpu)
{
	rv_regs_release(vcpu);
	free_page((unsigned long)vcpu->el2);
	free_page((unsigned long)vcpu->run);
	kfree(vcpu);
}

void rv_vcpu_setup(void)
{
	int cpu;

	/* Modules' initial values of variables of CPUs cannot have addresses in all kernels. */
	for_each_possible_cpu(cpu) {
		struct rv_kick *kick = per_cpu_ptr(&rv_kicks, cpu);

		INIT_CSD(&kick->csd, rv_kick_taken, kick);
	}
}

void rv_vcpu_exit(void)
{
	/* The last VM's interrupts may be on their way. */
	kick_all_cpus_sync();
}
