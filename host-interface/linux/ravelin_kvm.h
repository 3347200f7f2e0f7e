/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the module share.
 *
 * Locks, outermost first:
 *   rv_vcpu.lock        one ioctl at a time; the only one that is held while the guest runs
 *   rv_vm.lock          life cycle; creation of vCPUs and devices
 *   rv_vm.slots_lock    memory slots; for reading while a fault is handled
 *   mmap_lock
 *   the gmem's lock     states of its pages
 *   rv_slot.map_lock    what an ordinary VM has of a process's memory
 *   hypercalls
 * rv_irqs.mutex is taken inside vm->lock, and rv_irqs.lock, a raw spinlock, stands alone.
 */
#ifndef RAVELIN_KVM_H
#define RAVELIN_KVM_H

#include <linux/hrtimer.h>
#include <linux/jiffies.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/maple_tree.h>
#include <linux/mm_types.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/rcuwait.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/xarray.h>

#include "compat.h"
#include "hyp.h"
#include "irq.h"
#include "uapi_compat.h"

#define RV_MAX_SLOTS	512
#define RV_BLOCK_PAGES	512UL		/* of a 2 MiB block of stage 2 */

/* How long to wait for references that are about to go, such as those of a copy. */
#define RV_GMEM_PATIENCE msecs_to_jiffies(100)

struct rv_gmem;

enum rv_kind {
	RV_ORDINARY,
	RV_PKVM,
	RV_REALM,
};

enum rv_phase {
	RV_NEW,		/* known to Linux only */
	RV_LIVE,	/* sealed, can run */
	RV_DEAD,	/* torn down for good */
};

/* A memory slot. Its address and backing never change; a change makes another slot. */
struct rv_slot {
	struct rv_vm *vm;
	u32 id;
	u32 flags;
	u64 gpa;
	u64 size;
	u64 hva;

	/* gmem.c */
	struct rv_gmem *gmem;
	pgoff_t gmem_index;
	struct list_head gmem_link;

	/*
	 * anon.c: a bit for each page, and for each aligned 2 MiB that were mapped as one block
	 */
	struct mmu_interval_notifier notifier;
	struct mutex map_lock;	/* of the two below */
	unsigned long *mapped;
	unsigned long *blocks;
};

struct rv_vm {
	struct kref refs;	/* the VM's fd, those of vCPUs, guest_memfds and devices */
	struct mm_struct *mm;
	enum rv_kind kind;
	u8 ipa_bits;		/* those of a realm include the one that marks shared memory */

	struct mutex lock;	/* life cycle; creation of vCPUs and devices */
	enum rv_phase phase;	/* changes under lock, and under slots_lock for writing */
	u64 handle;		/* while RV_LIVE, and RV_DEAD until it is destroyed */
	u64 hypercall_exits;	/* KVM_CAP_EXIT_HYPERCALL */
	bool stopping;		/* vCPUs stay out, for the VM is being reset */
	unsigned int ended;	/* KVM_SYSTEM_EVENT_*, 0 while the guest has not ended itself */

	struct rw_semaphore slots_lock;
	struct xarray slots;		/* by number */
	struct maple_tree slot_tree;	/* by guest frame */

	struct xarray vcpus;

	struct mutex donated_lock;	/* of the list below */
	struct list_head donated;	/* pages that the hypervisor holds, by page->lru */
	bool created;			/* the hypervisor knows handle */
	bool unreturned;		/* and does not give back what it has: a defect */
	struct list_head created_link;

	struct rv_vgic vgic;
	struct rv_irqs irqs;
};

/* What KVM_RUN does first, because userspace owes an answer to the last exit. */
enum rv_pending {
	RV_PENDING_NONE,
	RV_PENDING_LOAD,
	RV_PENDING_HOST_CALL,
	RV_PENDING_CONVERT,
};

struct rv_regs;

struct rv_vcpu {
	struct rv_vm *vm;
	u32 id;
	struct mutex lock;		/* one ioctl at a time */
	struct kvm_run *run;		/* the page that userspace maps */
	void *el2;			/* the hypervisor's run page */

	bool initialized;		/* KVM_ARM_VCPU_INIT was done */
	bool starts_off;	/* the guest turns it on */
	bool powered;
	bool failed;
	u32 features;
	enum rv_pending pending;
	struct rv_regs *regs;		/* what userspace set while the VM is new */

	/*
	 * A wake-up sets woken, wakes who waits, and interrupts cpu. Who enters the guest writes
	 * cpu, then takes woken, with interrupts off, so one of the two sees the other.
	 */
	struct task_struct *task;	/* in KVM_RUN */
	struct rcuwait wait;
	bool woken;
	int cpu;			/* in the guest there; or -1 */
	struct hrtimer timer;
};

/*
 * hyp.c has rv_hyp(); this is for calls about a VM that may need translation tables. Sleeps.
 * Returns a status.
 */
long __rv_vm_hyp(struct rv_vm *vm, u32 fn, struct rv_result *result,
		 u64 a2, u64 a3, u64 a4);

#define __RV_VM_HYP(vm, fn, result, a2, a3, a4, ...) __rv_vm_hyp(vm, fn, result, a2, a3, a4)

/*
 * rv_vm_hyp(vm, function, result or NULL, arguments after the handle...): donates the tables that
 * a call lacks and tries again, and again while the VM is BUSY because another CPU changes it.
 * Sleeps. Returns a status, which is NEEDS_TABLES if memory is short.
 */
#define rv_vm_hyp(vm, fn, result, ...) __RV_VM_HYP(vm, fn, result, ##__VA_ARGS__, 0, 0, 0)

/* vm.c, vm_ioctl.c */
extern const struct file_operations rv_vm_fops;
int rv_vm_create(unsigned long type);
struct rv_vm *rv_vm_get(struct rv_vm *vm);
void rv_vm_put(struct rv_vm *vm);
/* Whether the hypervisor has pages for VMs. */
bool rv_vms_exist(void);
/* Ends all VMs, for ever: the machine is about to be another kernel's, which knows none of them. */
void rv_vms_end(void);
/* slots_lock is held, so that the VM does not end meanwhile, which takes the pages back. */
int rv_vm_donate_tables(struct rv_vm *vm, u64 pages);
/* Makes the VM at EL2, if it is not there. Called by the first KVM_RUN. */
int rv_vm_finalize(struct rv_vm *vm);
/* Takes a live ordinary VM from EL2, so that KVM_RUN makes it anew. */
int rv_vm_reset(struct rv_vm *vm);
/*
 * Ends the VM: from its return no vCPU runs, KVM_RUN fails with -EIO, and pages can be reclaimed.
 * May be called again. Takes vm->lock and vm->slots_lock, so the caller holds none of the gmem's
 * locks.
 */
void rv_vm_kill(struct rv_vm *vm);
/* -EIO if the ioctl comes from another process than the VM's. */
int rv_vm_check_mm(struct rv_vm *vm);
int rv_check_extension(struct rv_vm *vm, long cap);

/* vm.c: what the module found out when it was loaded */
extern u8 rv_max_ipa_bits;
int rv_vm_setup(void);

/* slots.c: slots_lock is held, for writing where they change */
int rv_set_memory_region(struct rv_vm *vm, const struct kvm_userspace_memory_region2 *region);
struct rv_slot *rv_slot_find(struct rv_vm *vm, u64 gpa);
/* The guest needs the page at @gpa: 0, or an errno as rv_gmem_fault(). */
int rv_slot_fault(struct rv_slot *slot, u64 gpa);
void rv_slots_release(struct rv_vm *vm);

static inline u64 rv_slot_pages(const struct rv_slot *slot)
{
	return slot->size >> PAGE_SHIFT;
}

/* Its memory is a process's own, and not that of a guest_memfd, which may be closed. */
static inline bool rv_slot_is_anon(const struct rv_slot *slot)
{
	return !(slot->flags & KVM_MEM_GUEST_MEMFD);
}

/* anon.c */
int rv_anon_bind(struct rv_slot *slot);
void rv_anon_unbind(struct rv_slot *slot);
int rv_anon_fault(struct rv_slot *slot, u64 gpa);
/* The VM is torn down: its pages are the process's alone again. */
void rv_anon_reclaim(struct rv_slot *slot);

/* vcpu_ioctl.c */
int rv_vcpu_create(struct rv_vm *vm, unsigned long id);

/* vcpu.c */
/* Once for the module. */
void rv_vcpu_setup(void);
void rv_vcpu_exit(void);
struct rv_vcpu *rv_vcpu_alloc(struct rv_vm *vm, u32 id);
void rv_vcpu_free(struct rv_vcpu *vcpu);
int rv_vcpu_run(struct rv_vcpu *vcpu);
/* The guest waits for another of its vCPUs, which may be a thread on this CPU. */
void rv_vcpu_yield(struct rv_vcpu *vcpu);
/* Sleeps until the vCPU is woken, a value of the physical counter, or a signal. Always 1. */
int rv_vcpu_wait(struct rv_vcpu *vcpu, u64 deadline);
/* Any context: the vCPU has something to do. Ends its waiting, or the run that it is in. */
void rv_vcpu_wake(struct rv_vcpu *vcpu);
/* Any context: the same for a set that the hypervisor names. */
void rv_vm_wake(struct rv_vm *vm, u64 low, u64 high);
void rv_vm_wake_all(struct rv_vm *vm);

/* exits.c: > 0 to run on, 0 to return to userspace, or an errno */
int rv_handle_exit(struct rv_vcpu *vcpu);
/* Answers the last exit with what userspace left in kvm_run. 0, or an errno. */
int rv_complete_exit(struct rv_vcpu *vcpu);

/* regs_sys.c: asks the hypervisor what registers vCPU 0 of a VM with @attributes has */
void rv_sysregs_setup(u64 attributes);

/* regs.c */
int rv_regs_init(struct rv_vcpu *vcpu);
void rv_regs_release(struct rv_vcpu *vcpu);
void rv_regs_reset(struct rv_vcpu *vcpu);
int rv_regs_load(struct rv_vcpu *vcpu);
u64 rv_regs_pc(struct rv_vcpu *vcpu);
u64 rv_regs_x0(struct rv_vcpu *vcpu);
long rv_get_one_reg(struct rv_vcpu *vcpu, const struct kvm_one_reg *reg);
long rv_set_one_reg(struct rv_vcpu *vcpu, const struct kvm_one_reg *reg);
long rv_get_reg_list(struct kvm_reg_list __user *list);

/* gmem.c */
#define RV_GMEM_FLAGS \
	(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED | GUEST_MEMFD_FLAG_NO_PIN)

/* The fd of a new file, which holds a reference to the VM. */
int rv_gmem_create(struct rv_vm *vm, const struct kvm_create_guest_memfd *args);
/*
 * slots_lock is held for writing. The slot does not hold the file: a file that is closed under a
 * slot leaves it without memory. Sets slot->gmem and slot->gmem_index.
 */
int rv_gmem_bind(struct rv_slot *slot, int fd, u64 offset);
void rv_gmem_unbind(struct rv_slot *slot);
/*
 * Before a protected VM is made: -EAGAIN if somebody refers to what the host has put into the
 * file.
 */
int rv_gmem_prepare(struct rv_slot *slot);
/* Before it is sealed: gives it what the host has put into the file, in ascending order. */
int rv_gmem_populate(struct rv_slot *slot);
/*
 * -EAGAIN: pinned. -EFAULT: no memory there. -ENOMEM. -EHWPOISON: the guest lost the page by
 * force.
 */
int rv_gmem_fault(struct rv_slot *slot, u64 gfn);
/* The guest takes pages back. -EBUSY if one stays pinned. */
int rv_gmem_unshare(struct rv_slot *slot, u64 gfn, u64 pages);
int rv_gmem_let_go(struct rv_slot *slot, u64 gfn, u64 pages, unsigned long deadline);
void rv_gmem_relinquished(struct rv_slot *slot, u64 gfn, u64 pages);
/* After the teardown of the VM: all pages of the slot are the host's. slots_lock is held. */
void rv_gmem_reclaim(struct rv_slot *slot);

/* debugfs.c: without it there is less to see, and nothing else is missing */
void rv_debugfs_init(void);
void rv_debugfs_exit(void);

#endif /* RAVELIN_KVM_H */
