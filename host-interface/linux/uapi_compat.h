/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Numbers of the KVM uAPI that the headers of older kernels lack, and those that are Ravelin's
 * own.
 */
#ifndef RV_UAPI_COMPAT_H
#define RV_UAPI_COMPAT_H

#include <linux/bits.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>

#ifndef GUEST_MEMFD_FLAG_MMAP
#define GUEST_MEMFD_FLAG_MMAP BIT_ULL(0)
#define GUEST_MEMFD_FLAG_INIT_SHARED BIT_ULL(1)
#endif

/* Ravelin's: nobody can pin what is mapped, and so it can be mapped 2 MiB at once. */
#define GUEST_MEMFD_FLAG_NO_PIN BIT_ULL(30)

#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#endif

#ifndef KVM_VM_TYPE_ARM_PROTECTED
#define KVM_VM_TYPE_ARM_PROTECTED BIT(31)
#endif

/* Ravelin's: a protected VM whose guest speaks the Realm Services Interface. */
#define KVM_VM_TYPE_ARM_REALM BIT(8)

#ifndef KVM_SET_MEMORY_ATTRIBUTES2
struct kvm_memory_attributes2 {
	union {
		__u64 address;
		__u64 offset;
	};
	__u64 size;
	__u64 attributes;
	__u64 flags;
	__u64 error_offset;
	__u64 reserved[11];
};

#define KVM_SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, struct kvm_memory_attributes2)
#endif

#endif /* RV_UAPI_COMPAT_H */
