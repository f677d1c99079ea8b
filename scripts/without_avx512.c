// Preloaded into a program, lets it see a processor without AVX-512 and AMX: scripts/without_avx512 builds and uses it.
//
// Linux can forbid a thread the cpuid instruction (cpuid faulting, inherited by threads and forks; after exec this
// library does it again). Each cpuid then raises SIGSEGV; the handler here runs the instruction itself, clears the bits
// of AVX-512, AVX10 and AMX in the answer, and goes on behind the instruction.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))
enum { ARCH_CPUID = 0x1012 };  // arch_prctl: whether this thread may execute cpuid

static int (*libc_sigaction)(int, const struct sigaction *, struct sigaction *);
static sighandler_t (*libc_signal)(int, sighandler_t);
static struct sigaction of_the_program;  // its own handler of SIGSEGV, as Python's faulthandler and gcc install one

static void answer(unsigned leaf, unsigned subleaf, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
    __asm__ volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "a"(leaf), "c"(subleaf));
    if (leaf == 7 && subleaf == 0) {
        *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));  // AVX-512 F to VL
        *c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                  // VBMI to VPOPCNTDQ
        *d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));               // 4VNNIW to FP16, AMX
    } else if (leaf == 7 && subleaf == 1) {
        *a &= ~(BIT(5) | BIT(21));  // AVX512_BF16, AMX-FP16
        *d &= ~BIT(19);             // AVX10
    }
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *at = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)at[REG_RIP];
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {  // a fault of the program's own
        if (of_the_program.sa_flags & SA_SIGINFO)
            of_the_program.sa_sigaction(number, info, context);
        else if (of_the_program.sa_handler != SIG_DFL && of_the_program.sa_handler != SIG_IGN)
            of_the_program.sa_handler(number);
        else
            libc_signal(SIGSEGV, SIG_DFL);  // the instruction faults again and ends the process
        return;
    }
    unsigned a, b, c, d;
    syscall(SYS_arch_prctl, ARCH_CPUID, 1);
    answer((unsigned)at[REG_RAX], (unsigned)at[REG_RCX], &a, &b, &c, &d);
    syscall(SYS_arch_prctl, ARCH_CPUID, 0);
    at[REG_RAX] = a, at[REG_RBX] = b, at[REG_RCX] = c, at[REG_RDX] = d;
    at[REG_RIP] += 2;
}

// The program's handlers of SIGSEGV are remembered, not installed: ours stays and calls them.
int sigaction(int number, const struct sigaction *wanted, struct sigaction *old) {
    if (number != SIGSEGV) return libc_sigaction(number, wanted, old);
    if (old) *old = of_the_program;
    if (wanted) of_the_program = *wanted;
    return 0;
}

sighandler_t signal(int number, sighandler_t wanted) {
    if (number != SIGSEGV) return libc_signal(number, wanted);
    sighandler_t old = of_the_program.sa_handler;
    of_the_program = (struct sigaction){.sa_handler = wanted};
    return old;
}

__attribute__((constructor)) static void hide(void) {
    libc_sigaction = (int (*)(int, const struct sigaction *, struct sigaction *))dlsym(RTLD_NEXT, "sigaction");
    libc_signal = (sighandler_t(*)(int, sighandler_t))dlsym(RTLD_NEXT, "signal");
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    libc_sigaction(SIGSEGV, &ours, NULL);
    if (syscall(SYS_arch_prctl, ARCH_CPUID, 0)) {
        fputs("AVX-512 cannot be hidden: this processor or kernel has no cpuid faulting\n", stderr);
        _exit(125);
    }
}
