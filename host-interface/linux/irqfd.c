// SPDX-License-Identifier: GPL-2.0-only
/* KVM_IRQFD: interrupts that eventfds raise. */
#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/list.h>
#include <linux/poll.h>
#include <linux/slab.h>

#include "ravelin_kvm.h"

struct rv_irqfd {
	struct list_head link;		/* in vm->irqs.irqfds, under its mutex */
	bool dead;			/* taken out by who will free it */
	struct rv_vm *vm;
	struct eventfd_ctx *eventfd;
	u32 gsi;
	poll_table table;
	wait_queue_entry_t wait;
	struct work_struct hangup;
};

/* Called by whoever signals the eventfd, with its lock held. */
static int rv_irqfd_event(wait_queue_entry_t *wait, unsigned int mode, int sync,
			  void *key)
{
	struct rv_irqfd *irqfd = container_of(wait, struct rv_irqfd, wait);
	__poll_t events = key_to_poll(key);
	u64 count;

	/* Its file is gone, and it cannot be deassigned any more. */
	if (events & EPOLLHUP)
		queue_work(rv_irq_wq, &irqfd->hangup);
	if (!(events & EPOLLIN))
		return 0;
	/* Read it, so that the count never reaches its limit. */
	eventfd_ctx_do_read(irqfd->eventfd, &count);
	rv_gsi_pulse(irqfd->vm, irqfd->gsi);
	return 1;
}

static void rv_irqfd_enqueue(struct file *file, wait_queue_head_t *queue,
			     poll_table *table)
{
	struct rv_irqfd *irqfd = container_of(table, struct rv_irqfd, table);

	add_wait_queue_priority(queue, &irqfd->wait);
}

static void rv_irqfd_bury(struct rv_irqfd *irqfd)
{
	lockdep_assert_held(&irqfd->vm->irqs.mutex);
	irqfd->dead = true;
	list_del(&irqfd->link);
}

/* No event comes any more when this has returned. */
static void rv_irqfd_detach(struct rv_irqfd *irqfd)
{
	u64 count;

	eventfd_ctx_remove_wait_queue(irqfd->eventfd, &irqfd->wait, &count);
	eventfd_ctx_put(irqfd->eventfd);
}

static void rv_irqfd_hangup(struct work_struct *work)
{
	struct rv_irqfd *irqfd = container_of(work, struct rv_irqfd, hangup);
	struct mutex *mutex = &irqfd->vm->irqs.mutex;
	bool mine;

	mutex_lock(mutex);
	mine = !irqfd->dead;
	if (mine)
		rv_irqfd_bury(irqfd);
	mutex_unlock(mutex);
	if (!mine)
		return;
	rv_irqfd_detach(irqfd);
	kfree(irqfd);
}

/* Takes out those that match: of an eventfd and a GSI, or all. */
static void rv_irqfd_remove(struct rv_vm *vm, const struct eventfd_ctx *eventfd,
			    u32 gsi)
{
	struct rv_irqfd *irqfd, *next;
	LIST_HEAD(removed);

	mutex_lock(&vm->irqs.mutex);
	list_for_each_entry_safe(irqfd, next, &vm->irqs.irqfds, link) {
		if (eventfd && (irqfd->eventfd != eventfd || irqfd->gsi != gsi))
			continue;
		rv_irqfd_bury(irqfd);
		list_add(&irqfd->link, &removed);
	}
	mutex_unlock(&vm->irqs.mutex);

	list_for_each_entry_safe(irqfd, next, &removed, link) {
		rv_irqfd_detach(irqfd);
		cancel_work_sync(&irqfd->hangup);
		kfree(irqfd);
	}
}

static bool rv_irqfd_exists(const struct rv_vm *vm,
			    const struct eventfd_ctx *eventfd)
{
	const struct rv_irqfd *irqfd;

	list_for_each_entry(irqfd, &vm->irqs.irqfds, link) {
		if (irqfd->eventfd == eventfd)
			return true;
	}
	return false;
}

static int rv_irqfd_add(struct rv_vm *vm, struct file *file, u32 gsi)
{
	struct rv_irqfd *irqfd;

	irqfd = kzalloc_obj(*irqfd, GFP_KERNEL_ACCOUNT);
	if (!irqfd)
		return -ENOMEM;
	irqfd->vm = vm;
	irqfd->gsi = gsi;
	INIT_WORK(&irqfd->hangup, rv_irqfd_hangup);
	init_waitqueue_func_entry(&irqfd->wait, rv_irqfd_event);
	init_poll_funcptr(&irqfd->table, rv_irqfd_enqueue);
	irqfd->eventfd = eventfd_ctx_fileget(file);
	if (IS_ERR(irqfd->eventfd)) {
		int ret = PTR_ERR(irqfd->eventfd);

		kfree(irqfd);
		return ret;
	}

	mutex_lock(&vm->irqs.mutex);
	if (rv_irqfd_exists(vm, irqfd->eventfd)) {
		mutex_unlock(&vm->irqs.mutex);
		eventfd_ctx_put(irqfd->eventfd);
		kfree(irqfd);
		return -EBUSY;
	}
	list_add_tail(&irqfd->link, &vm->irqs.irqfds);
	/* Signalled already: nobody will wake us for that. */
	if (vfs_poll(file, &irqfd->table) & EPOLLIN)
		rv_gsi_pulse(vm, gsi);
	mutex_unlock(&vm->irqs.mutex);
	return 0;
}

static int rv_irqfd_assign(struct rv_vm *vm, int fd, u32 gsi)
{
	struct file *file;
	int ret;

	if (!rv_vgic_ready(&vm->vgic))
		return -EAGAIN;
	file = eventfd_fget(fd);
	if (IS_ERR(file))
		return PTR_ERR(file);
	ret = rv_irqfd_add(vm, file, gsi);
	fput(file);
	return ret;
}

static int rv_irqfd_deassign(struct rv_vm *vm, int fd, u32 gsi)
{
	struct eventfd_ctx *eventfd = eventfd_ctx_fdget(fd);

	if (IS_ERR(eventfd))
		return PTR_ERR(eventfd);
	rv_irqfd_remove(vm, eventfd, gsi);
	eventfd_ctx_put(eventfd);
	return 0;
}

int rv_irqfd(struct rv_vm *vm, const struct kvm_irqfd *args)
{
	/* Resampling needs to be told of the end of an interrupt. */
	if (args->flags & ~KVM_IRQFD_FLAG_DEASSIGN)
		return -EINVAL;
	if (args->flags & KVM_IRQFD_FLAG_DEASSIGN)
		return rv_irqfd_deassign(vm, args->fd, args->gsi);
	return rv_irqfd_assign(vm, args->fd, args->gsi);
}

void rv_irqfd_close(struct rv_vm *vm)
{
	rv_irqfd_remove(vm, NULL, 0);
	/* Those whose files are gone may be on their way out. */
	flush_workqueue(rv_irq_wq);
}
