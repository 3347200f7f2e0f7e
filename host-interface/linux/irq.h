/* SPDX-License-Identifier: GPL-2.0-only */
/* Interrupts of a VM: the vGICv3 device, SPIs, routes, irqfds and ioeventfds. */
#ifndef RV_IRQ_H
#define RV_IRQ_H

#include <linux/bitmap.h>
#include <linux/kvm.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/workqueue.h>

struct rv_vm;
struct rv_routes;

/* The hypervisor gives each VM INTIDs 32 to 287. */
#define RV_FIRST_SPI	32
#define RV_NR_SPIS	256
#define RV_NR_INTIDS	(RV_FIRST_SPI + RV_NR_SPIS)

/* Most entries of KVM_SET_GSI_ROUTING, what KVM_CAP_IRQ_ROUTING says. */
#define RV_MAX_ROUTES	4096

/* What userspace has said about the interrupt controller. Guarded by vm->lock. */
struct rv_vgic {
	bool created;
	bool has_dist;
	bool has_redist;
	u32 redists;		/* of the region, 0 if it was set without a count */
	u64 dist;
	u64 redist;
	u32 nr_intids;		/* 0 until userspace or the initialisation sets it */
	bool ready;		/* initialised: no vCPUs any more, interrupts from now on */
};

struct rv_irqs {
	/* Lines of the SPIs. Held across the hypercall, so that the last level wins. */
	raw_spinlock_t lock;
	bool live;		/* the hypervisor knows the VM by @handle */
	u64 handle;
	DECLARE_BITMAP(level, RV_NR_SPIS);
	/* SPIs that the hypervisor was too busy for, and those of them that missed a rise. */
	DECLARE_BITMAP(late, RV_NR_SPIS);
	DECLARE_BITMAP(late_rise, RV_NR_SPIS);
	struct delayed_work late_work;

	/* Innermost of the sleeping locks. Guards what follows. */
	struct mutex mutex;
	struct rv_routes __rcu *routes;
	struct list_head irqfds;
	struct list_head ioeventfds;	/* read under RCU, too */
	unsigned int nr_ioeventfds;
};

/* Once for the module. */
int rv_irq_setup(void);
void rv_irq_exit(void);

int rv_irq_init(struct rv_vm *vm);
/* The VM's fd is closed, so there are no irqfds any more. Sleeps. */
void rv_irq_close(struct rv_vm *vm);
/* Later: the VM is about to be freed. Sleeps. */
void rv_irq_release(struct rv_vm *vm);

/*
 * Any context. Sets the level of an SPI, and wakes who has to know. Before the
 * VM is live the level is remembered.
 */
int rv_spi(struct rv_vm *vm, u32 intid, bool level);
/* The same for a rise and a fall. */
int rv_spi_pulse(struct rv_vm *vm, u32 intid);
/* The VM is live, as vm->handle: tells the hypervisor all levels. */
void rv_vgic_replay(struct rv_vm *vm);
/* The VM is not live any more. Its devices keep their levels. */
void rv_irq_stop(struct rv_vm *vm);

int rv_vgic_create(struct rv_vm *vm, struct kvm_create_device *args);
/*
 * Where the guest finds it. If no vGIC was made, the top of the address space.
 * -ENXIO, -EBUSY: userspace has not set it up. vm->lock is held, at finalize.
 */
int rv_vgic_addresses(struct rv_vm *vm, u64 *dist, u64 *redist);

/* The ioctls of these names. */
int rv_irq_line(struct rv_vm *vm, const struct kvm_irq_level *args);
int rv_signal_msi(struct rv_vm *vm, const struct kvm_msi *args);
int rv_set_gsi_routing(struct rv_vm *vm,
		       const struct kvm_irq_routing __user *args);
int rv_irqfd(struct rv_vm *vm, const struct kvm_irqfd *args);
int rv_ioeventfd(struct rv_vm *vm, const struct kvm_ioeventfd *args);

/* A store to @gpa: true if an eventfd took it. */
bool rv_ioeventfd_signal(struct rv_vm *vm, u64 gpa, u32 len, u64 value);

/* Between the files of this part. */

/* From then on all of vm->vgic but the addresses stays as it is. */
static inline bool rv_vgic_ready(const struct rv_vgic *vgic)
{
	/* Pairs with the release in rv_vgic_make_ready(). */
	return smp_load_acquire(&vgic->ready);
}

extern struct workqueue_struct *rv_irq_wq;
void rv_gsi_pulse(struct rv_vm *vm, u32 gsi);
void rv_irqfd_close(struct rv_vm *vm);
void rv_ioeventfd_release(struct rv_vm *vm);

#endif /* RV_IRQ_H */
