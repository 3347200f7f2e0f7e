// SPDX-License-Identifier: GPL-2.0-only
/* SPIs of a VM: their lines, KVM_IRQ_LINE, KVM_SIGNAL_MSI, KVM_SET_GSI_ROUTING. */
#include <linux/mm.h>
#include <linux/overflow.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "ravelin_kvm.h"

/* Offset of GICD_SETSPI_NSR in the distributor: where devices write messages. */
#define RV_SETSPI_NSR	0x40

enum rv_route_type { RV_ROUTE_NONE, RV_ROUTE_PIN, RV_ROUTE_MSI };

struct rv_route {
	u64 address;		/* of a message */
	u32 data;		/* of a message; INTID of a pin */
	enum rv_route_type type;
};

/* What each GSI leads to, as of one KVM_SET_GSI_ROUTING. */
struct rv_routes {
	struct rcu_head rcu;
	u32 nr;
	struct rv_route gsi[] __counted_by(nr);
};

struct workqueue_struct *rv_irq_wq;

/*
 * Tells the hypervisor about the line of an SPI and collects in @wake the
 * vCPUs that have something to do. Called with irqs->lock held.
 */
static void rv_spi_send(struct rv_irqs *irqs, u32 spi, bool level, u64 wake[2])
{
	struct rv_result result;
	long status;

	status = rv_hyp(RAVELIN_CALL_SPI, &result, irqs->handle,
			RV_FIRST_SPI + spi, level);
	if (status == RAVELIN_STATUS_SUCCESS) {
		wake[0] |= result.x1;
		wake[1] |= result.x2;
	} else if (status == RAVELIN_STATUS_BUSY) {
		__set_bit(spi, irqs->late);
		if (level)
			__set_bit(spi, irqs->late_rise);
		queue_delayed_work(rv_irq_wq, &irqs->late_work, 1);
	}
	/* Any other: the VM is at its end, and nobody is left to interrupt. */
}

static void rv_wake(struct rv_vm *vm, const u64 wake[2])
{
	if (wake[0] | wake[1])
		rv_vm_wake(vm, wake[0], wake[1]);
}

static int rv_spi_change(struct rv_vm *vm, u32 intid, bool rise, bool level)
{
	struct rv_irqs *irqs = &vm->irqs;
	u64 wake[2] = {};
	unsigned long flags;
	u32 spi = intid - RV_FIRST_SPI;

	if (intid < RV_FIRST_SPI || intid >= READ_ONCE(vm->vgic.nr_intids))
		return -EINVAL;

	raw_spin_lock_irqsave(&irqs->lock, flags);
	__assign_bit(spi, irqs->level, level);
	if (irqs->live) {
		if (rise)
			rv_spi_send(irqs, spi, true, wake);
		if (!level)
			rv_spi_send(irqs, spi, false, wake);
	}
	raw_spin_unlock_irqrestore(&irqs->lock, flags);
	rv_wake(vm, wake);
	return 0;
}

int rv_spi(struct rv_vm *vm, u32 intid, bool level)
{
	return rv_spi_change(vm, intid, level, level);
}

int rv_spi_pulse(struct rv_vm *vm, u32 intid)
{
	return rv_spi_change(vm, intid, true, false);
}

void rv_vgic_replay(struct rv_vm *vm)
{
	struct rv_irqs *irqs = &vm->irqs;
	u64 wake[2] = {};
	unsigned long flags;
	unsigned int spi;

	raw_spin_lock_irqsave(&irqs->lock, flags);
	irqs->handle = vm->handle;
	irqs->live = true;
	for_each_set_bit(spi, irqs->level, RV_NR_SPIS)
		rv_spi_send(irqs, spi, true, wake);
	raw_spin_unlock_irqrestore(&irqs->lock, flags);
	rv_wake(vm, wake);
}

/* Says again what the hypervisor was too busy for. */
static void rv_late_work(struct work_struct *work)
{
	struct rv_irqs *irqs = container_of(to_delayed_work(work),
					    struct rv_irqs, late_work);
	struct rv_vm *vm = container_of(irqs, struct rv_vm, irqs);
	unsigned int spi;
	unsigned long flags;

	for (spi = 0; spi < RV_NR_SPIS; spi++) {
		u64 wake[2] = {};

		raw_spin_lock_irqsave(&irqs->lock, flags);
		if (irqs->live && __test_and_clear_bit(spi, irqs->late)) {
			if (__test_and_clear_bit(spi, irqs->late_rise))
				rv_spi_send(irqs, spi, true, wake);
			if (!test_bit(spi, irqs->level))
				rv_spi_send(irqs, spi, false, wake);
		}
		raw_spin_unlock_irqrestore(&irqs->lock, flags);
		rv_wake(vm, wake);
	}
}

int rv_irq_line(struct rv_vm *vm, const struct kvm_irq_level *args)
{
	u32 type = (args->irq >> KVM_ARM_IRQ_TYPE_SHIFT) & KVM_ARM_IRQ_TYPE_MASK;
	u32 number = (args->irq >> KVM_ARM_IRQ_NUM_SHIFT) & KVM_ARM_IRQ_NUM_MASK;

	/* There is always an interrupt controller before the CPU. */
	if (type == KVM_ARM_IRQ_TYPE_CPU)
		return -ENXIO;
	/* What is private to a vCPU is the hypervisor's to raise. */
	if (type != KVM_ARM_IRQ_TYPE_SPI)
		return -EINVAL;
	if (!READ_ONCE(vm->vgic.created))
		return -ENXIO;
	if (!rv_vgic_ready(&vm->vgic))
		return -EBUSY;
	return rv_spi(vm, number, args->level);
}

/* A message is for the distributor, and its data is the INTID. */
static int rv_msi(struct rv_vm *vm, u64 address, u32 data)
{
	if (!rv_vgic_ready(&vm->vgic))
		return -EBUSY;
	/* Pairs with the release in rv_set_dist(). */
	if (!smp_load_acquire(&vm->vgic.has_dist) ||
	    address != vm->vgic.dist + RV_SETSPI_NSR)
		return -EINVAL;
	return rv_spi_pulse(vm, data);
}

int rv_signal_msi(struct rv_vm *vm, const struct kvm_msi *args)
{
	u64 address = (u64)args->address_hi << 32 | args->address_lo;

	if (!READ_ONCE(vm->vgic.created) || args->flags & ~KVM_MSI_VALID_DEVID)
		return -EINVAL;
	/* 1: delivered. */
	return rv_msi(vm, address, args->data) ?: 1;
}

void rv_gsi_pulse(struct rv_vm *vm, u32 gsi)
{
	const struct rv_routes *routes;
	struct rv_route route = {};

	rcu_read_lock();
	routes = rcu_dereference(vm->irqs.routes);
	if (gsi < routes->nr)
		route = routes->gsi[gsi];
	rcu_read_unlock();

	/* Whoever signals an eventfd has no use for an error. */
	if (route.type == RV_ROUTE_PIN)
		rv_spi_pulse(vm, route.data);
	else if (route.type == RV_ROUTE_MSI)
		rv_msi(vm, route.address, route.data);
}

static struct rv_routes *rv_alloc_routes(u32 nr)
{
	struct rv_routes *routes;

	routes = kvzalloc(struct_size(routes, gsi, nr), GFP_KERNEL_ACCOUNT);
	if (routes)
		routes->nr = nr;
	return routes;
}

static int rv_set_route(struct rv_route *route,
			const struct kvm_irq_routing_entry *entry)
{
	/* With one interrupt controller, a GSI leads to one place. */
	if (route->type != RV_ROUTE_NONE)
		return -EINVAL;

	switch (entry->type) {
	case KVM_IRQ_ROUTING_IRQCHIP:
		if (entry->flags || entry->u.irqchip.irqchip ||
		    entry->u.irqchip.pin >= RV_NR_SPIS)
			return -EINVAL;
		route->type = RV_ROUTE_PIN;
		route->data = RV_FIRST_SPI + entry->u.irqchip.pin;
		return 0;
	case KVM_IRQ_ROUTING_MSI:
		if (entry->flags & ~KVM_MSI_VALID_DEVID)
			return -EINVAL;
		route->type = RV_ROUTE_MSI;
		route->address = (u64)entry->u.msi.address_hi << 32 |
				 entry->u.msi.address_lo;
		route->data = entry->u.msi.data;
		return 0;
	default:
		return -EINVAL;
	}
}

static struct rv_routes *
rv_make_routes(const struct kvm_irq_routing_entry *entries, u32 nr)
{
	struct rv_routes *routes;
	u32 gsis = 0;
	u32 i;
	int ret;

	for (i = 0; i < nr; i++) {
		if (entries[i].gsi >= RV_MAX_ROUTES)
			return ERR_PTR(-EINVAL);
		gsis = max(gsis, entries[i].gsi + 1);
	}

	routes = rv_alloc_routes(gsis);
	if (!routes)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < nr; i++) {
		ret = rv_set_route(&routes->gsi[entries[i].gsi], &entries[i]);
		if (ret) {
			kvfree(routes);
			return ERR_PTR(ret);
		}
	}
	return routes;
}

int rv_set_gsi_routing(struct rv_vm *vm,
		       const struct kvm_irq_routing __user *args)
{
	struct kvm_irq_routing_entry *entries = NULL;
	struct rv_irqs *irqs = &vm->irqs;
	struct kvm_irq_routing header;
	struct rv_routes *routes;

	if (copy_from_user(&header, args, sizeof(header)))
		return -EFAULT;
	if (header.flags || header.nr > RV_MAX_ROUTES)
		return -EINVAL;
	if (header.nr) {
		entries = vmemdup_array_user(args->entries, header.nr,
					     sizeof(*entries));
		if (IS_ERR(entries))
			return PTR_ERR(entries);
	}
	routes = rv_make_routes(entries, header.nr);
	kvfree(entries);
	if (IS_ERR(routes))
		return PTR_ERR(routes);

	mutex_lock(&irqs->mutex);
	routes = rcu_replace_pointer(irqs->routes, routes,
				     lockdep_is_held(&irqs->mutex));
	mutex_unlock(&irqs->mutex);
	kvfree_rcu(routes, rcu);
	return 0;
}

/* Until userspace says otherwise, GSI n is SPI n. */
static struct rv_routes *rv_default_routes(void)
{
	struct rv_routes *routes = rv_alloc_routes(RV_NR_SPIS);
	u32 i;

	for (i = 0; routes && i < RV_NR_SPIS; i++) {
		routes->gsi[i].type = RV_ROUTE_PIN;
		routes->gsi[i].data = RV_FIRST_SPI + i;
	}
	return routes;
}

int rv_irq_init(struct rv_vm *vm)
{
	struct rv_irqs *irqs = &vm->irqs;
	struct rv_routes *routes = rv_default_routes();

	if (!routes)
		return -ENOMEM;
	raw_spin_lock_init(&irqs->lock);
	mutex_init(&irqs->mutex);
	INIT_DELAYED_WORK(&irqs->late_work, rv_late_work);
	INIT_LIST_HEAD(&irqs->irqfds);
	INIT_LIST_HEAD(&irqs->ioeventfds);
	RCU_INIT_POINTER(irqs->routes, routes);
	return 0;
}

void rv_irq_close(struct rv_vm *vm)
{
	rv_irqfd_close(vm);
}

void rv_irq_stop(struct rv_vm *vm)
{
	struct rv_irqs *irqs = &vm->irqs;
	unsigned long flags;

	raw_spin_lock_irqsave(&irqs->lock, flags);
	irqs->live = false;
	raw_spin_unlock_irqrestore(&irqs->lock, flags);
}

void rv_irq_release(struct rv_vm *vm)
{
	struct rv_irqs *irqs = &vm->irqs;

	rv_ioeventfd_release(vm);
	/* The work queues itself as long as the hypervisor is busy. */
	rv_irq_stop(vm);
	cancel_delayed_work_sync(&irqs->late_work);
	/* Without irqfds there are no readers. */
	kvfree(rcu_dereference_protected(irqs->routes, true));
}

int rv_irq_setup(void)
{
	rv_irq_wq = alloc_workqueue("ravelin-irq", WQ_UNBOUND, 0);
	return rv_irq_wq ? 0 : -ENOMEM;
}

void rv_irq_exit(void)
{
	destroy_workqueue(rv_irq_wq);
}
