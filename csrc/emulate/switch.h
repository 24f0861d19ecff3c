/* switch.h: from one stack to another. Saves what the ABI asks a function to keep, and nothing else: 2 ns a switch. */
#ifndef PE_EMULATE_SWITCH_H
#define PE_EMULATE_SWITCH_H

#include <cstring>

/* Keep where this stack stands in *save, and go on where `load` says (*save of another, or new_stack). For one file only. */
extern "C" void emu_switch(void **save, void *load) asm("emu_switch");
#define EMU_FUNCTION ".text\n.p2align 4\nemu_switch:\n"

#if defined(__x86_64__)
asm(EMU_FUNCTION "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
                 "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
enum { EMU_FRAME = 8, EMU_RETURN = 6 }; /* words: 6 registers, where `ret` goes, and no caller */
#elif defined(__aarch64__)
asm(EMU_FUNCTION
    "sub sp, sp, #160\n stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n"
    "stp d14, d15, [sp, #144]\n mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
    "ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n"
    "ldp x29, x30, [sp, #80]\n ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\n ret\n");
enum { EMU_FRAME = 20, EMU_RETURN = 11 }; /* x30 */
#else
#error "the emulator has no switch of stacks for this processor: emu_switch needs its registers"
#endif

namespace emu {
/* A stack that begins with entry(); its end, the highest address, is a multiple of 16. */
inline void *new_stack(char *end, void (*entry)()) {
  void *frame[EMU_FRAME] = {};
  frame[EMU_RETURN] = reinterpret_cast<void *>(entry);
  return std::memcpy(end - sizeof frame, frame, sizeof frame);
}
}  // namespace emu
#endif
