// Entry, translation tables, vectors, and the call of code that the host has sent.

.arch armv8-a+fp+simd

// Words of a vCPU's block.
.set    SAVED_SP, {saved_sp}
.set    FAULT, {fault}
.set    REGISTERS, {registers}

.section .head, "ax"
.global _start
_start:
    mov     x19, x0
    adrp    x9, stage1_level0
    add     x9, x9, :lo12:stage1_level0
    msr     ttbr0_el1, x9
    mov     x9, #0x04ff             // attribute 0: Normal write-back, attribute 1: Device-nGnRE
    msr     mair_el1, x9
    mrs     x9, id_aa64mmfr0_el1
    and     x9, x9, #0xf
    mov     x10, #5                 // 48 bits at most
    cmp     x9, x10
    csel    x9, x9, x10, lo
    lsl     x9, x9, #32
    ldr     x10, =0x00803510        // T0SZ = 16, write-back, inner shareable, 4 KiB granule, no walks from TTBR1
    orr     x9, x9, x10
    msr     tcr_el1, x9
    adrp    x9, vectors
    add     x9, x9, :lo12:vectors
    msr     vbar_el1, x9
    mov     x9, #(3 << 20)          // FP and SIMD on
    msr     cpacr_el1, x9
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    ldr     x9, =0x30d01805         // RES1 bits, MMU, data and instruction caches
    msr     sctlr_el1, x9
    isb
    msr     spsel, #1
    add     sp, x19, #{block_size}
    mov     x29, xzr
    mov     x0, x19
    bl      {main}
    b       .
    .ltorg

// Stage 1: identity. The first gigabyte of each of 32 gigabytes is Device (devices, and their alias in a realm), the rest is
// Normal; everything is RWX at EL1.
.macro BLOCKS first, count, attributes
    .set    .Lindex, \first
    .rept   \count
    .quad   (.Lindex << 30) | \attributes
    .set    .Lindex, .Lindex + 1
    .endr
.endm

.section .data.tables, "aw"
.balign 4096
.global stage1_level0
stage1_level0:
    .quad   stage1_level1 + 3
    .quad   stage1_high + 3
    .fill   510, 8, 0
.global stage1_level1
stage1_level1:
    .set    .Lgroup, 0
    .rept   16
    BLOCKS  .Lgroup * 32, 1, 0x0060000000000405
    BLOCKS  .Lgroup * 32 + 1, 31, 0x0040000000000701
    .set    .Lgroup, .Lgroup + 1
    .endr
.global stage1_high
stage1_high:
    .rept   16
    BLOCKS  .Lgroup * 32, 1, 0x0060000000000405
    BLOCKS  .Lgroup * 32 + 1, 31, 0x0040000000000701
    .set    .Lgroup, .Lgroup + 1
    .endr

.section .text.vectors, "ax"

.macro UNEXPECTED offset
    .balign 0x80
    mov     x0, #\offset
    b       unexpected
.endm

.balign 0x800
vectors:
    UNEXPECTED 0x000
    UNEXPECTED 0x080
    UNEXPECTED 0x100
    UNEXPECTED 0x180
    .balign 0x80                    // 0x200: synchronous, EL1h
    b       synchronous
    .balign 0x80                    // 0x280: IRQ, EL1h
    b       interrupt
    UNEXPECTED 0x300
    UNEXPECTED 0x380
    UNEXPECTED 0x400
    UNEXPECTED 0x480
    UNEXPECTED 0x500
    UNEXPECTED 0x580
    UNEXPECTED 0x600
    UNEXPECTED 0x680
    UNEXPECTED 0x700
    UNEXPECTED 0x780

// The stack lies at the end of the block.
.macro BLOCK_OF_STACK register
    mov     \register, sp
    and     \register, \register, #~({block_size} - 1)
.endm

synchronous:
    stp     x9, x10, [sp, #-16]!
    BLOCK_OF_STACK x9
    ldr     x10, [x9, #SAVED_SP]
    cbz     x10, 1f
    mov     sp, x10
    mrs     x10, esr_el1
    str     x10, [x9, #FAULT]
    mrs     x10, far_el1
    str     x10, [x9, #FAULT + 8]
    mrs     x10, elr_el1
    str     x10, [x9, #FAULT + 16]
    adr     x10, run_failed
    msr     elr_el1, x10
    eret
1:  ldp     x9, x10, [sp], #16
    mov     x0, #0x200
unexpected:
    stp     x9, x10, [sp, #-16]!
    BLOCK_OF_STACK x1
    bl      {unexpected}
    b       .

interrupt:
    stp     x0, x1, [sp, #-176]!
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
    BLOCK_OF_STACK x0
    bl      {interrupt}
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
    ldp     x0, x1, [sp], #176
    eret

// Calls the code at x1 with the registers in the block x0, and puts those that it leaves there. Returns 0, or 1 if an exception
// ended it.
.section .text.run, "ax"
.global run_code
run_code:
    stp     x29, x30, [sp, #-112]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
    stp     x18, x0, [sp, #96]
    mov     x9, sp
    str     x9, [x0, #SAVED_SP]
    mov     x16, x1
    add     x9, x0, #REGISTERS
    ldp     x0, x1, [x9]
    ldp     x2, x3, [x9, #16]
    ldp     x4, x5, [x9, #32]
    ldp     x6, x7, [x9, #48]
    blr     x16
    ldr     x9, [sp, #104]
    add     x9, x9, #REGISTERS
    stp     x0, x1, [x9]
    stp     x2, x3, [x9, #16]
    stp     x4, x5, [x9, #32]
    stp     x6, x7, [x9, #48]
    mov     x0, xzr
    b       1f
run_failed:
    mov     x0, #1
1:  ldr     x9, [sp, #104]
    str     xzr, [x9, #SAVED_SP]
    ldr     x18, [sp, #96]
    ldp     x19, x20, [sp, #16]
    ldp     x21, x22, [sp, #32]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #64]
    ldp     x27, x28, [sp, #80]
    ldp     x29, x30, [sp], #112
    ret
