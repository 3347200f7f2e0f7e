// The world switch: from EL2 code to a guest and back, with the general-purpose registers. System registers and the
// floating-point unit are switched by Rust around it.

.section .text.guest, "ax"

.macro guest_vector slot
    .balign 0x80
    stp     x0, x1, [sp, #-16]!
    mov     x0, #(\slot & 3)             // AArch32 EL0 comes by slots of its own
    b       .Lguest_exit
.endm

// x19 to x28, to the context that x1 points to.
.macro save_preserved
    str     x19, [x1, #{x} + 152]
    stp     x20, x21, [x1, #{x} + 160]
    stp     x22, x23, [x1, #{x} + 176]
    stp     x24, x25, [x1, #{x} + 192]
    stp     x26, x27, [x1, #{x} + 208]
    str     x28, [x1, #{x} + 224]
.endm

// Goes on with the guest at `way` if x3, what its handler says, is 1, and no IRQ, FIQ or SError waits. One that does is not sure
// to be taken before the guest's next instruction if that traps again (DDI 0487, D1.3.6), and so a guest of nothing but calls
// could keep the CPU. Else x1 is the context, which x0 points to, and x0 why the guest is left: 0 if nobody has handled it, or 1.
.macro goes_on way
    mrs     x2, isr_el1
    mov     x1, x0
    cbnz    x2, 1f
    tbnz    w3, #0, \way
1:  mov     x0, x3
.endm

// An exception of EL2's own is as fatal with these vectors in place as with any.
.macro fatal_guest_vector slot
    .balign 0x80
    msr     tpidr_el0, x0
    mov     x0, #\slot
    b       fatal
.endm

.balign 4096                             // ADRP finds them
.global guest_vectors
guest_vectors:
    fatal_guest_vector 0
    fatal_guest_vector 1
    fatal_guest_vector 2
    fatal_guest_vector 3
    fatal_guest_vector 4
    fatal_guest_vector 5
    fatal_guest_vector 6
    fatal_guest_vector 7
    guest_vector 8
    guest_vector 9
    guest_vector 10
    guest_vector 11
    guest_vector 12
    guest_vector 13
    guest_vector 14
    guest_vector 15
    .balign 0x80

// u64 guest_run(Context *guest, bool (*handles)(void *its, Context *guest, u64 esr), void *its): runs the guest until it comes
// to EL2 and returns why: 0 = synchronous exception, 1 = IRQ, 2 = FIQ, 3 = SError. VBAR_EL2 is `guest_vectors`.
//
// Calls and accesses to system registers are `handles`'s first, and the guest goes on if it says so. It preserves x19 to x28, so
// that they stay in the CPU, unless the guest may have named one of them. All labels are local, so that who reads the machine
// code finds one function.
.global guest_run
guest_run:
    hint    #34                         // bti c
    stp     x29, x30, [sp, #-128]!
    stp     x27, x28, [sp, #16]
    stp     x25, x26, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x21, x22, [sp, #64]
    stp     x19, x20, [sp, #80]
    stp     x2, x1, [sp, #96]
    str     x0, [sp, #112]
.Lguest_load:
    ldr     x19, [x0, #{x} + 152]
    ldp     x20, x21, [x0, #{x} + 160]
    ldp     x22, x23, [x0, #{x} + 176]
    ldp     x24, x25, [x0, #{x} + 192]
    ldp     x26, x27, [x0, #{x} + 208]
    ldr     x28, [x0, #{x} + 224]
.Lguest_enter:
    ldp     x2, x3, [x0, #{pc}]         // and pstate
    msr     elr_el2, x2
    msr     spsr_el2, x3
    ldp     x2, x3, [x0, #{x} + 16]
    ldp     x4, x5, [x0, #{x} + 32]
    ldp     x6, x7, [x0, #{x} + 48]
    ldp     x8, x9, [x0, #{x} + 64]
    ldp     x10, x11, [x0, #{x} + 80]
    ldp     x12, x13, [x0, #{x} + 96]
    ldp     x14, x15, [x0, #{x} + 112]
    ldp     x16, x17, [x0, #{x} + 128]
    ldr     x18, [x0, #{x} + 144]
    ldp     x29, x30, [x0, #{x} + 232]
    ldp     x0, x1, [x0, #{x}]
    eret
    dsb     nsh                         // no speculation past ERET
    isb

// x0 = why; the guest's x0 and x1 lie on the stack, on top of what guest_run left there.
.Lguest_exit:
    ldr     x1, [sp, #16 + 112]
    stp     x2, x3, [x1, #{x} + 16]
    stp     x4, x5, [x1, #{x} + 32]
    stp     x6, x7, [x1, #{x} + 48]
    stp     x8, x9, [x1, #{x} + 64]
    stp     x10, x11, [x1, #{x} + 80]
    stp     x12, x13, [x1, #{x} + 96]
    stp     x14, x15, [x1, #{x} + 112]
    stp     x16, x17, [x1, #{x} + 128]
    str     x18, [x1, #{x} + 144]
    stp     x29, x30, [x1, #{x} + 232]
    ldp     x2, x3, [sp], #16
    stp     x2, x3, [x1, #{x}]
    mrs     x2, elr_el2
    mrs     x3, spsr_el2
    stp     x2, x3, [x1, #{pc}]         // and pstate
    cbnz    x0, .Lguest_leave
    mrs     x2, esr_el2
    ubfx    x3, x2, #26, #6
    sub     x3, x3, #0x16
    cmp     x3, #2
    b.hi    .Lguest_leave
    mov     x29, sp
    ldp     x0, x4, [sp, #96]
    b.eq    .Lguest_sysreg              // class 0x18
    blr     x4                          // 0x16 or 0x17: HVC or SMC of AArch64
    and     x3, x0, #1
    ldr     x0, [sp, #112]
    goes_on .Lguest_enter
.Lguest_leave:
    save_preserved
.Lguest_left:
    ldp     x19, x20, [sp, #80]
    ldp     x21, x22, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #32]
    ldp     x27, x28, [sp, #16]
    ldp     x29, x30, [sp], #128
    ret

.Lguest_sysreg:
    save_preserved
    blr     x4
    and     x3, x0, #1
    ldr     x0, [sp, #112]
    goes_on .Lguest_load
    b       .Lguest_left
