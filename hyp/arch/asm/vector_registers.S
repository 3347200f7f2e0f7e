// FP, SIMD and SVE registers, to and from memory.
//
// The only code at EL2 that touches them: between `vector_code_start` and `vector_code_end`, where the gate over the image's
// instructions lets it. x0 = where, a multiple of 16: FPSR, FPCR, ZCR_EL1, 8 bytes to spare, and then the registers.

.arch_extension fp
.arch_extension simd
.arch_extension sve

// Q0 to Q31.
.macro simd_registers operation
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    \operation     q\n, [x0, #(32 + 16 * \n)]
    .endr
.endm

// Z0 to Z31, with the vector length of EL2, which is the longest. x0 = behind the four words, and then behind Z31.
.macro z_registers operation
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    \operation     z\n, [x0, #\n, mul vl]
    .endr
    addvl   x0, x0, #16
    addvl   x0, x0, #16
.endm

// P0 to P15.
.macro p_registers operation
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    \operation     p\n, [x0, #\n, mul vl]
    .endr
.endm

.section .text.vector_registers, "ax"
.global vector_code_start
vector_code_start:

.global simd_save
simd_save:
    hint    #34                         // bti c
    mrs     x1, fpsr
    mrs     x2, fpcr
    stp     x1, x2, [x0]
    simd_registers str
    ret

.global simd_load
simd_load:
    hint    #34                         // bti c
    ldp     x1, x2, [x0]
    msr     fpsr, x1
    msr     fpcr, x2
    simd_registers ldr
    ret

.global sve_save
sve_save:
    hint    #34                         // bti c
    mrs     x1, fpsr
    mrs     x2, fpcr
    mrs     x3, s3_0_c1_c2_0            // zcr_el1
    stp     x1, x2, [x0]
    str     x3, [x0, #16]
    add     x0, x0, #32
    z_registers str
    p_registers str
    rdffr   p0.b                        // behind P15; P0 has been saved
    str     p0, [x0, #16, mul vl]
    ret

.global sve_load
sve_load:
    hint    #34                         // bti c
    ldp     x1, x2, [x0]
    ldr     x3, [x0, #16]
    msr     fpsr, x1
    msr     fpcr, x2
    msr     s3_0_c1_c2_0, x3            // zcr_el1: no part in the length at EL2
    add     x0, x0, #32
    z_registers ldr
    ldr     p0, [x0, #16, mul vl]
    wrffr   p0.b
    p_registers ldr
    ret

// Returns the vector length of EL2 in bytes.
.global sve_length
sve_length:
    hint    #34                         // bti c
    rdvl    x0, #1
    ret

.global vector_code_end
vector_code_end:
