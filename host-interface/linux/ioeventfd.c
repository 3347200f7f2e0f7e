// SPDX-License-Identifier: GPL-2.0-only
/* KVM_IOEVENTFD: stores of the guest that signal eventfds. */
#include <linux/eventfd.h>
#include <linux/overflow.h>
#include <linux/rculist.h>
#include <linux/slab.h>

#include "ravelin_kvm.h"

/* Each store to a device looks at all of them. */
#define RV_MAX_IOEVENTFDS	1000

struct rv_ioeventfd {
	struct list_head link;
	struct eventfd_ctx *eventfd;
	u64 address;
	u64 value;
	u32 len;	/* 0: any */
	bool any_value;
};

bool rv_ioeventfd_signal(struct rv_vm *vm, u64 gpa, u32 len, u64 value)
{
	const struct rv_ioeventfd *it;
	bool found = false;

	rcu_read_lock();
	list_for_each_entry_rcu(it, &vm->irqs.ioeventfds, link) {
		if (it->address != gpa || (it->len && it->len != len) ||
		    (!it->any_value && it->value != value))
			continue;
		eventfd_signal(it->eventfd);
		found = true;
		break;
	}
	rcu_read_unlock();
	return found;
}

/* Whether one store could match both. */
static bool rv_ioeventfd_collide(const struct rv_ioeventfd *a,
				 const struct rv_ioeventfd *b)
{
	if (a->address != b->address)
		return false;
	if (!a->len || !b->len)
		return true;
	return a->len == b->len &&
	       (a->any_value || b->any_value || a->value == b->value);
}

static int rv_ioeventfd_add(struct rv_vm *vm, struct rv_ioeventfd *new)
{
	struct rv_irqs *irqs = &vm->irqs;
	const struct rv_ioeventfd *it;

	lockdep_assert_held(&irqs->mutex);
	list_for_each_entry(it, &irqs->ioeventfds, link) {
		if (rv_ioeventfd_collide(it, new))
			return -EEXIST;
	}
	if (irqs->nr_ioeventfds >= RV_MAX_IOEVENTFDS)
		return -ENOSPC;
	irqs->nr_ioeventfds++;
	list_add_tail_rcu(&new->link, &irqs->ioeventfds);
	return 0;
}

/* Nobody sees it yet, or any more. */
static void rv_ioeventfd_free(struct rv_ioeventfd *it)
{
	eventfd_ctx_put(it->eventfd);
	kfree(it);
}

static int rv_ioeventfd_assign(struct rv_vm *vm, const struct rv_ioeventfd *what)
{
	struct rv_ioeventfd *new;
	int ret;

	new = kmemdup(what, sizeof(*what), GFP_KERNEL_ACCOUNT);
	if (!new)
		return -ENOMEM;
	mutex_lock(&vm->irqs.mutex);
	ret = rv_ioeventfd_add(vm, new);
	mutex_unlock(&vm->irqs.mutex);
	if (ret) {
		kfree(new);
		return ret;
	}
	return 0;
}

static struct rv_ioeventfd *rv_ioeventfd_take(struct rv_irqs *irqs,
					      const struct rv_ioeventfd *what)
{
	struct rv_ioeventfd *it;

	lockdep_assert_held(&irqs->mutex);
	list_for_each_entry(it, &irqs->ioeventfds, link) {
		if (it->eventfd != what->eventfd ||
		    it->address != what->address || it->len != what->len ||
		    it->any_value != what->any_value ||
		    (!it->any_value && it->value != what->value))
			continue;
		list_del_rcu(&it->link);
		irqs->nr_ioeventfds--;
		return it;
	}
	return NULL;
}

static int rv_ioeventfd_deassign(struct rv_vm *vm,
				 const struct rv_ioeventfd *what)
{
	struct rv_ioeventfd *it;

	mutex_lock(&vm->irqs.mutex);
	it = rv_ioeventfd_take(&vm->irqs, what);
	mutex_unlock(&vm->irqs.mutex);
	if (!it)
		return -ENOENT;
	/* A vCPU may be signalling it. */
	synchronize_rcu_expedited();
	rv_ioeventfd_free(it);
	return 0;
}

static int rv_ioeventfd_check(const struct kvm_ioeventfd *args)
{
	u64 end;

	/* There are no ports, and no other ways to notify. */
	if (args->flags & ~(KVM_IOEVENTFD_FLAG_DATAMATCH |
			    KVM_IOEVENTFD_FLAG_DEASSIGN))
		return -EINVAL;
	switch (args->len) {
	case 0:
		if (args->flags & KVM_IOEVENTFD_FLAG_DATAMATCH)
			return -EINVAL;
		break;
	case 1:
	case 2:
	case 4:
	case 8:
		break;
	default:
		return -EINVAL;
	}
	return check_add_overflow(args->addr, (u64)args->len, &end) ? -EINVAL : 0;
}

int rv_ioeventfd(struct rv_vm *vm, const struct kvm_ioeventfd *args)
{
	struct rv_ioeventfd what = {
		.address = args->addr,
		.value = args->datamatch,
		.len = args->len,
		.any_value = !(args->flags & KVM_IOEVENTFD_FLAG_DATAMATCH),
	};
	bool deassign = args->flags & KVM_IOEVENTFD_FLAG_DEASSIGN;
	int ret;

	ret = rv_ioeventfd_check(args);
	if (ret)
		return ret;
	what.eventfd = eventfd_ctx_fdget(args->fd);
	if (IS_ERR(what.eventfd))
		return PTR_ERR(what.eventfd);

	ret = deassign ? rv_ioeventfd_deassign(vm, &what) :
			 rv_ioeventfd_assign(vm, &what);
	/* One that is assigned keeps the reference. */
	if (ret || deassign)
		eventfd_ctx_put(what.eventfd);
	return ret;
}

/* No vCPU exists any more. */
void rv_ioeventfd_release(struct rv_vm *vm)
{
	struct rv_ioeventfd *it, *next;

	list_for_each_entry_safe(it, next, &vm->irqs.ioeventfds, link)
		rv_ioeventfd_free(it);
}
