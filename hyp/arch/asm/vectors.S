// EL2 exception vectors.
//
// The host exits through `host_vector`; everything else that arrives here is a fault of ours.

// What `host_exit` gets: x0-x18, x29, x30. The callee-saved registers stay where they are.
.set FRAME_SIZE, 176

.macro host_vector
    .balign 0x80
    sub     sp, sp, #FRAME_SIZE
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x29, [sp, #144]
    str     x30, [sp, #160]
    b       host_exit_common
.endm

// The stack may be what went wrong: go to the emergency stack. The machine will not go on, so that the EL0 thread
// registers can hold two registers meanwhile.
.macro fatal_vector slot
    .balign 0x80
    msr     tpidr_el0, x0
    mov     x0, #\slot
    b       fatal
.endm

.section .text.vectors, "ax"
.balign 4096                             // ADRP finds them
.global vectors
vectors:
    fatal_vector 0
    fatal_vector 1
    fatal_vector 2
    fatal_vector 3
    fatal_vector 4
    fatal_vector 5
    fatal_vector 6
    fatal_vector 7
    host_vector                         // synchronous, host in AArch64
    fatal_vector 9
    fatal_vector 10
    fatal_vector 11
    host_vector                         // synchronous, host's EL0 in AArch32
    fatal_vector 13
    fatal_vector 14
    fatal_vector 15
    .balign 0x80

host_exit_common:
    mov     x29, xzr                    // backtraces end here
    mov     x30, xzr
    mov     x0, sp
    bl      host_exit
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x29, [sp, #144]
    ldr     x30, [sp, #160]
    ldp     x0, x1, [sp], #FRAME_SIZE
    eret
    dsb     nsh                         // no speculation past ERET
    isb

// x0 = slot of the vector table; the interrupted x0 is in tpidr_el0.
.global fatal
fatal:
    msr     tpidrro_el0, x1
    mov     x1, sp
    msr     tpidr_el1, x1
    mrs     x1, tpidr_el2
    cbz     x1, 1f                      // early: the boot stack is all there is
    ldr     x1, [x1, #56]               // CpuStart::emergency_stack
    mov     sp, x1
1:  sub     sp, sp, #304
    stp     x2, x3, [sp, #16]
    mrs     x2, tpidr_el0
    mrs     x3, tpidrro_el0
    stp     x2, x3, [sp]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    mrs     x2, tpidr_el1
    stp     x30, x2, [sp, #240]
    // At EL1, before it is known that there is no EL2 to be had, the EL2 registers do not exist.
    mrs     x4, CurrentEL
    cmp     x4, #(2 << 2)
    b.ne    2f
    mrs     x2, elr_el2
    mrs     x3, spsr_el2
    mrs     x4, esr_el2
    mrs     x5, far_el2
    b       3f
2:  mrs     x2, elr_el1
    mrs     x3, spsr_el1
    mrs     x4, esr_el1
    mrs     x5, far_el1
3:  stp     x2, x3, [sp, #256]
    stp     x4, x5, [sp, #272]
    mov     x1, x0
    mov     x0, sp
    bl      fatal_exception
    b       .
