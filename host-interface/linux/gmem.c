// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd: the file, and what processes do with it.
 *
 * A file belongs to the VM that it was made for, for ever, and is one struct file with an inode
 * of its own: its release is the end of both, and of all mappings.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/file.h>
#include <linux/fs_context.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/pseudo_fs.h>
#include <linux/sched/signal.h>
#include <linux/splice.h>
#include <linux/uio.h>

#include "gmem.h"
#include "ravelin_kvm.h"

#define RV_GMEM_MAGIC 0x52764c6e

/* How many pages a fault maps at most. */
#define RV_GMEM_FAULT_AROUND 64UL

/* Mounted while there are files. */
static struct vfsmount *rv_gmem_mount;
static int rv_gmem_mounts;

/* Makes the page at @index one that the host may touch. NULL for a hole, if @hole is fine. */
static struct page *rv_gmem_make_usable(struct rv_gmem *gmem, pgoff_t index, bool hole)
{
	struct page *page = rv_gmem_page(gmem, index);
	int err;

	if (gmem->vm->kind != RV_ORDINARY && rv_gmem_is(gmem, index, RV_GMEM_GIVEN)) {
		err = rv_gmem_is(gmem, index, RV_GMEM_CLAIMED) ?
			      0 : rv_gmem_claim_ahead(gmem, index);
		return err ? ERR_PTR(err) : page;
	}
	if (!rv_gmem_host_may(gmem, index))
		return ERR_PTR(-EFAULT);
	if (!page) {
		if (hole)
			return NULL;
		err = rv_gmem_alloc(gmem, index);
		if (err)
			return ERR_PTR(err);
		page = rv_gmem_page(gmem, index);
	}
	rv_gmem_touched(gmem, index);
	return page;
}

/*
 * Returns the page at @index for the host to touch, NULL for a hole if @hole is fine, or an errno.
 * Holds the lock for reading in each case. Until it is dropped the guest does not get the page.
 */
static struct page *rv_gmem_lock_page(struct rv_gmem *gmem, pgoff_t index, bool hole)
{
	struct page *page;

	down_read(&gmem->lock);
	if (rv_gmem_is(gmem, index, RV_GMEM_CLAIMED) ||
	    (rv_gmem_is(gmem, index, RV_GMEM_TOUCHED) && rv_gmem_host_may(gmem, index)))
		return rv_gmem_page(gmem, index);
	up_read(&gmem->lock);

	down_write(&gmem->lock);
	page = rv_gmem_make_usable(gmem, index, hole);
	downgrade_write(&gmem->lock);
	return page;
}

/* The same with a reference in place of the lock. */
static struct page *rv_gmem_get_page(struct rv_gmem *gmem, pgoff_t index, bool hole)
{
	struct page *page = rv_gmem_lock_page(gmem, index, hole);

	if (!IS_ERR_OR_NULL(page))
		get_page(page);
	up_read(&gmem->lock);
	return page;
}

struct rv_gmem_insertion {
	struct vm_area_struct *vma;
	struct page **pages;
};

static int rv_gmem_insert_pte(pte_t *pte, unsigned long address, void *data)
{
	struct rv_gmem_insertion *insertion = data;
	struct vm_area_struct *vma = insertion->vma;
	struct page *page = *insertion->pages++;

	if (pte_none(ptep_get(pte)))
		set_pte_at(vma->vm_mm, address, pte,
			   pte_mkspecial(pfn_pte(page_to_pfn(page), vma->vm_page_prot)));
	return 0;
}

/*
 * Maps pages without references: who takes them from processes unmaps them first. As
 * vmf_insert_pfn(), which would walk the page tables for each page.
 */
static int rv_gmem_insert_pfns(struct vm_area_struct *vma, unsigned long address,
			       struct page **pages, unsigned long nr)
{
	struct rv_gmem_insertion insertion = { vma, pages };

	return apply_to_page_range(vma->vm_mm, address, nr * PAGE_SIZE, rv_gmem_insert_pte,
				   &insertion);
}

/* Maps a page that is there, and pages behind it that the guest has offered and we have claimed. */
static int rv_gmem_map_around(struct rv_gmem *gmem, struct vm_fault *vmf)
{
	unsigned long address = vmf->address & PAGE_MASK, most, nr;
	struct page **pages = rv_gmem_pages(gmem, vmf->pgoff);

	/* Within one page table, as the first. */
	most = min3(PHYS_PFN(vmf->vma->vm_end - address), PTRS_PER_PTE - pte_index(address),
		    RV_GMEM_FAULT_AROUND);
	/* What is claimed is a guest's, and so not touched by its state. */
	nr = rv_gmem_length(gmem, vmf->pgoff, most, RV_GMEM_CLAIMED, RV_GMEM_TOUCHED);
	nr = max(nr, 1UL);
	if (gmem->flags & GUEST_MEMFD_FLAG_NO_PIN)
		return rv_gmem_insert_pfns(vmf->vma, address, pages, nr);
	/* It ends at what is mapped already. */
	return vm_insert_pages(vmf->vma, address, pages, &nr);
}

static vm_fault_t rv_gmem_vm_fault(struct vm_fault *vmf)
{
	struct rv_gmem *gmem = vmf->vma->vm_file->private_data;
	struct page *page;
	int err;

	if (vmf->pgoff >= gmem->nr)
		return VM_FAULT_SIGBUS;
	page = rv_gmem_lock_page(gmem, vmf->pgoff, false);
	if (IS_ERR(page))
		err = PTR_ERR(page);
	else if (pmd_trans_huge(pmdp_get_lockless(vmf->pmd)))
		err = 0;	/* Another thread was faster, and has mapped the block. */
	else
		err = rv_gmem_map_around(gmem, vmf);
	up_read(&gmem->lock);

	/* EBUSY: another thread was faster, for one of them at least. */
	return err && err != -EBUSY ? vmf_error(err) : VM_FAULT_NOPAGE;
}

static const struct vm_operations_struct rv_gmem_vm_ops = {
	.fault = rv_gmem_vm_fault,
};

/* Else get_user_pages_fast() would take references through an entry of 2 MiB. */
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
/*
 * Maps a block of memory at once, if a guest has offered all of it, and there is no page table yet.
 * The lock is held for writing, so that nobody maps single pages there meanwhile.
 */
static vm_fault_t rv_gmem_map_block(struct rv_gmem *gmem, struct vm_fault *vmf, pgoff_t first)
{
	pmd_t pmd = pmdp_get_lockless(vmf->pmd);
	struct rv_run run;

	/* Of an ordinary VM there is nothing to claim. */
	if (gmem->vm->kind == RV_ORDINARY || (!pmd_none(pmd) && !pmd_trans_huge(pmd)))
		return VM_FAULT_FALLBACK;
	if (!rv_gmem_next_run(gmem, first, first + RV_BLOCK_PAGES - 1, RV_GMEM_GIVEN, &run) ||
	    run.nr != RV_BLOCK_PAGES || !IS_ALIGNED(page_to_pfn(run.page), RV_BLOCK_PAGES) ||
	    rv_gmem_claim_block(gmem, first))
		return VM_FAULT_FALLBACK;
	return rv_insert_pfn_pmd(vmf, page_to_pfn(run.page), vmf->flags & FAULT_FLAG_WRITE);
}

static vm_fault_t rv_gmem_vm_huge_fault(struct vm_fault *vmf, unsigned int order)
{
	unsigned long address = ALIGN_DOWN(vmf->address, PMD_SIZE);
	struct vm_area_struct *vma = vmf->vma;
	struct rv_gmem *gmem = vma->vm_file->private_data;
	vm_fault_t fault;
	pgoff_t first;

	if (order != ilog2(RV_BLOCK_PAGES) || address < vma->vm_start ||
	    vma->vm_end - address < PMD_SIZE)
		return VM_FAULT_FALLBACK;
	first = linear_page_index(vma, address);
	if (!IS_ALIGNED(first, RV_BLOCK_PAGES))
		return VM_FAULT_FALLBACK;

	down_write(&gmem->lock);
	fault = rv_gmem_map_block(gmem, vmf, first);
	up_write(&gmem->lock);
	return fault;
}

#endif

/*
 * fork() calls this before it copies. It reads an entry of 2 MiB before it takes the locks
 * (copy_huge_pmd()), so that one which we take out meanwhile would stay in the child. So there is
 * none to copy: faults of the parent wait until fork() is done.
 */
static void rv_gmem_vm_open(struct vm_area_struct *vma)
{
	rv_gmem_unmap(vma->vm_file->private_data, vma->vm_pgoff,
		      vma->vm_pgoff + vma_pages(vma) - 1);
}

static const struct vm_operations_struct rv_gmem_no_pin_vm_ops = {
	.open = rv_gmem_vm_open,
	.fault = rv_gmem_vm_fault,
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
	.huge_fault = rv_gmem_vm_huge_fault,
#endif
};

static int rv_gmem_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct rv_gmem *gmem = file->private_data;

	if (!(gmem->flags & GUEST_MEMFD_FLAG_MMAP))
		return -ENODEV;
	if ((vma->vm_flags & (VM_SHARED | VM_MAYSHARE)) != (VM_SHARED | VM_MAYSHARE))
		return -EINVAL;
	if (gmem->flags & GUEST_MEMFD_FLAG_NO_PIN) {
		vm_flags_set(vma, VM_PFNMAP | VM_DONTDUMP);
		vma->vm_ops = &rv_gmem_no_pin_vm_ops;
	} else {
		vm_flags_set(vma, VM_MIXEDMAP | VM_DONTDUMP);
		vma->vm_ops = &rv_gmem_vm_ops;
	}
	return 0;
}

/*
 * Copies page by page, with a reference and without the lock, because the other side may be
 * memory of the same file. Meanwhile the guest cannot have the page.
 */
static ssize_t rv_gmem_copy(struct kiocb *iocb, struct iov_iter *iter, bool write)
{
	struct rv_gmem *gmem = iocb->ki_filp->private_data;
	loff_t size = (loff_t)gmem->nr << PAGE_SHIFT;
	ssize_t done = 0;
	int err = 0;

	while (iov_iter_count(iter) && iocb->ki_pos < size) {
		size_t offset = offset_in_page(iocb->ki_pos);
		size_t bytes = min(PAGE_SIZE - offset, iov_iter_count(iter)), copied;
		struct page *page;

		if (fatal_signal_pending(current)) {
			err = -EINTR;
			break;
		}
		page = rv_gmem_get_page(gmem, iocb->ki_pos >> PAGE_SHIFT, !write);
		if (IS_ERR(page)) {
			err = PTR_ERR(page);
			break;
		}
		if (!page)
			copied = iov_iter_zero(bytes, iter);
		else if (write)
			copied = copy_page_from_iter(page, offset, bytes, iter);
		else
			copied = copy_page_to_iter(page, offset, bytes, iter);
		if (page)
			put_page(page);
		done += copied;
		iocb->ki_pos += copied;
		if (copied < bytes) {
			err = -EFAULT;
			break;
		}
		cond_resched();
	}
	return done ?: err;
}

static ssize_t rv_gmem_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	return rv_gmem_copy(iocb, to, false);
}

static ssize_t rv_gmem_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct rv_gmem *gmem = iocb->ki_filp->private_data;
	ssize_t bytes = generic_write_checks(iocb, from);

	if (bytes <= 0)
		return bytes;
	/* The file does not grow. */
	if (iocb->ki_pos >> PAGE_SHIFT >= gmem->nr)
		return -ENOSPC;
	return rv_gmem_copy(iocb, from, true);
}

static ssize_t rv_gmem_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
				   size_t len, unsigned int flags)
{
	ssize_t ret = copy_splice_read(file, pos, pipe, len, flags);

	/* It says so of memory that cannot be read, which is no reason to try again. */
	return ret == -EAGAIN ? -EFAULT : ret;
}

/* Makes holes. Pages that a guest has are taken from it. */
static int rv_gmem_punch(struct rv_gmem *gmem, pgoff_t first, pgoff_t last)
{
	unsigned long deadline = jiffies + RV_GMEM_PATIENCE;
	struct rv_vm *vm = gmem->vm;
	int err;

	do {
		if (down_read_killable(&vm->slots_lock))
			return -EINTR;
		down_write(&gmem->lock);
		err = rv_gmem_take_back(gmem, first, last);
		if (!err) {
			rv_gmem_unmap(gmem, first, last);
			rv_gmem_free(gmem, first, last);
		}
		up_write(&gmem->lock);
		up_read(&vm->slots_lock);
	} while (err == -EAGAIN && rv_gmem_wait(deadline));
	return err;
}

static int rv_gmem_punch_hole(struct rv_gmem *gmem, loff_t offset, loff_t len)
{
	pgoff_t first = offset >> PAGE_SHIFT;
	pgoff_t end = min_t(pgoff_t, (offset + len) >> PAGE_SHIFT, gmem->nr);
	unsigned long number = first / RV_BLOCK_PAGES;
	int err = 0;

	/* A block at a time, so that others get their turn. Where there is none are only holes. */
	while (!err && first < end && xa_find(&gmem->blocks, &number, (end - 1) / RV_BLOCK_PAGES,
					      XA_PRESENT)) {
		first = max(first, number * RV_BLOCK_PAGES);
		number++;
		err = fatal_signal_pending(current) ? -EINTR :
			rv_gmem_punch(gmem, first, min(end, number * RV_BLOCK_PAGES) - 1);
		cond_resched();
	}
	return err;
}

static int rv_gmem_allocate(struct rv_gmem *gmem, loff_t offset, loff_t len)
{
	pgoff_t index = offset >> PAGE_SHIFT;
	pgoff_t end = (offset + len) >> PAGE_SHIFT;
	int err = 0;

	if (end > gmem->nr)
		return -EINVAL;
	for (; index < end && !err; index++) {
		if (signal_pending(current))
			return -EINTR;
		down_write(&gmem->lock);
		if (!rv_gmem_page(gmem, index))
			err = rv_gmem_alloc(gmem, index);
		up_write(&gmem->lock);
		cond_resched();
	}
	return err;
}

static long rv_gmem_fallocate(struct file *file, int mode, loff_t offset, loff_t len)
{
	struct rv_gmem *gmem = file->private_data;

	if (!(mode & FALLOC_FL_KEEP_SIZE) ||
	    mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE))
		return -EOPNOTSUPP;
	if (!PAGE_ALIGNED(offset) || !PAGE_ALIGNED(len))
		return -EINVAL;
	if (mode & FALLOC_FL_PUNCH_HOLE)
		return rv_gmem_punch_hole(gmem, offset, len);
	return rv_gmem_allocate(gmem, offset, len);
}

/*
 * Locks the slots for writing, when no protected guest that lives has pages of the file. It does
 * not survive that they go.
 */
static void rv_gmem_end_guest(struct rv_gmem *gmem)
{
	struct rv_vm *vm = gmem->vm;
	pgoff_t first = 0;

	down_write(&vm->slots_lock);
	/* Without the gmem's lock: the file is closed, and who comes by a slot holds slots_lock. */
	while (vm->kind != RV_ORDINARY && vm->phase == RV_LIVE &&
	       rv_gmem_find(gmem, &first, gmem->nr - 1, RV_GMEM_GIVEN)) {
		up_write(&vm->slots_lock);
		rv_vm_kill(vm);
		down_write(&vm->slots_lock);
	}
}

static int rv_gmem_release(struct inode *inode, struct file *file)
{
	struct rv_gmem *gmem = file->private_data;
	struct rv_vm *vm = gmem->vm;
	struct rv_slot *slot, *next;
	struct rv_gmem_block *block;
	unsigned long number;

	rv_gmem_end_guest(gmem);
	list_for_each_entry_safe(slot, next, &gmem->slots, gmem_link)
		rv_gmem_unbind(slot);
	up_write(&vm->slots_lock);

	rv_gmem_free(gmem, 0, ULONG_MAX);
	xa_for_each(&gmem->blocks, number, block) {
		pr_warn_once("the hypervisor does not return pages of a VM: they are lost\n");
		kvfree(block);
	}
	xa_destroy(&gmem->blocks);
	mtree_destroy(&gmem->attributes);
	kfree(gmem);
	rv_vm_put(vm);
	/* The file itself still has the mount, and by that the module. */
	simple_release_fs(&rv_gmem_mount, &rv_gmem_mounts);
	return 0;
}

static const struct file_operations rv_gmem_fops = {
	.owner = THIS_MODULE,
	.llseek = generic_file_llseek,
	.read_iter = rv_gmem_read_iter,
	.write_iter = rv_gmem_write_iter,
	.splice_read = rv_gmem_splice_read,
	.splice_write = iter_file_splice_write,
	.unlocked_ioctl = rv_gmem_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = rv_gmem_mmap,
	.get_unmapped_area = thp_get_unmapped_area,
	.fsync = noop_fsync,
	.fallocate = rv_gmem_fallocate,
	.release = rv_gmem_release,
};

/* Mode, owner and size stay as they are. */
static int rv_gmem_setattr(struct mnt_idmap *idmap, struct dentry *dentry, struct iattr *attr)
{
	return -EINVAL;
}

static const struct inode_operations rv_gmem_iops = {
	.setattr = rv_gmem_setattr,
};

static int rv_gmem_init_fs_context(struct fs_context *fc)
{
	if (!init_pseudo(fc, RV_GMEM_MAGIC))
		return -ENOMEM;
	fc->s_iflags |= SB_I_NOEXEC | SB_I_NODEV;
	return 0;
}

static struct file_system_type rv_gmem_fs = {
	.owner = THIS_MODULE,
	.name = "ravelin_gmem",
	.init_fs_context = rv_gmem_init_fs_context,
	.kill_sb = kill_anon_super,
};

static struct inode *rv_gmem_inode(loff_t size)
{
	struct inode *inode = new_inode(rv_gmem_mount->mnt_sb);

	if (!inode)
		return ERR_PTR(-ENOMEM);
	inode->i_ino = get_next_ino();
	inode->i_mode = S_IFREG | 0600;
	inode->i_uid = current_fsuid();
	inode->i_gid = current_fsgid();
	inode->i_op = &rv_gmem_iops;
	simple_inode_init_ts(inode);
	i_size_write(inode, size);
	return inode;
}

static struct file *rv_gmem_file(struct rv_vm *vm, const struct kvm_create_guest_memfd *args)
{
	struct rv_gmem *gmem;
	struct inode *inode;
	struct file *file;

	gmem = kzalloc_obj(*gmem, GFP_KERNEL_ACCOUNT);
	if (!gmem)
		return ERR_PTR(-ENOMEM);
	inode = rv_gmem_inode(args->size);
	if (IS_ERR(inode)) {
		kfree(gmem);
		return ERR_CAST(inode);
	}
	file = alloc_file_pseudo(inode, rv_gmem_mount, "[kvm-gmem]", O_RDWR | O_LARGEFILE,
				 &rv_gmem_fops);
	if (IS_ERR(file)) {
		iput(inode);
		kfree(gmem);
		return file;
	}
	/* As the file's operations have an owner, whose reference goes with the file. */
	__module_get(THIS_MODULE);
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD | FMODE_PWRITE;
	file->private_data = gmem;

	gmem->vm = rv_vm_get(vm);
	gmem->inode = inode;
	gmem->flags = args->flags;
	gmem->nr = args->size >> PAGE_SHIFT;
	init_rwsem(&gmem->lock);
	xa_init_flags(&gmem->blocks, XA_FLAGS_ACCOUNT);
	mt_init(&gmem->attributes);
	INIT_LIST_HEAD(&gmem->slots);
	return file;
}

int rv_gmem_create(struct rv_vm *vm, const struct kvm_create_guest_memfd *args)
{
	struct file *file;
	int fd, err;

	if (args->flags & ~RV_GMEM_FLAGS)
		return -EINVAL;
	if ((loff_t)args->size <= 0 || !PAGE_ALIGNED(args->size))
		return -EINVAL;
	fd = get_unused_fd_flags(0);
	if (fd < 0)
		return fd;
	err = simple_pin_fs(&rv_gmem_fs, &rv_gmem_mount, &rv_gmem_mounts);
	if (err) {
		put_unused_fd(fd);
		return err;
	}
	file = rv_gmem_file(vm, args);
	if (IS_ERR(file)) {
		simple_release_fs(&rv_gmem_mount, &rv_gmem_mounts);
		put_unused_fd(fd);
		return PTR_ERR(file);
	}
	fd_install(fd, file);
	return fd;
}

static int rv_gmem_bind_file(struct rv_slot *slot, struct file *file, u64 offset)
{
	struct rv_gmem *gmem = file->private_data;
	struct rv_slot *other;
	pgoff_t first, end;

	if (file->f_op != &rv_gmem_fops || gmem->vm != slot->vm)
		return -EINVAL;
	first = offset >> PAGE_SHIFT;
	end = first + rv_slot_pages(slot);
	if (!PAGE_ALIGNED(offset) || end > gmem->nr)
		return -EINVAL;
	list_for_each_entry(other, &gmem->slots, gmem_link) {
		if (first < other->gmem_index + rv_slot_pages(other) && other->gmem_index < end)
			return -EEXIST;
	}
	down_write(&gmem->lock);
	slot->gmem = gmem;
	slot->gmem_index = first;
	list_add(&slot->gmem_link, &gmem->slots);
	up_write(&gmem->lock);
	return 0;
}

int rv_gmem_bind(struct rv_slot *slot, int fd, u64 offset)
{
	struct file *file = fget(fd);
	int err;

	if (!file)
		return -EBADF;
	err = rv_gmem_bind_file(slot, file, offset);
	fput(file);
	return err;
}

void rv_gmem_unbind(struct rv_slot *slot)
{
	struct rv_gmem *gmem = slot->gmem;

	if (!gmem)
		return;
	down_write(&gmem->lock);
	rv_gmem_take_slot(slot);
	list_del(&slot->gmem_link);
	slot->gmem = NULL;
	up_write(&gmem->lock);
}
