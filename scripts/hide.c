// Preloaded into a program, hides instructions of the processor from it: scripts/hide builds and uses it.
//
// Linux can forbid a thread the cpuid instruction (cpuid faulting, inherited by threads and forks; after exec this
// library does it again). Each cpuid then raises SIGSEGV; the handler here runs the instruction itself, clears the bits
// of the features named in SPARSIFY_HIDDEN, and goes on behind the instruction.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))
enum { ARCH_CPUID = 0x1012 };  // arch_prctl: whether this thread may execute cpuid
enum { A, B, C, D };

// Bits of leaf 7 that tell of a feature; Intel SDM, volume 2A, CPUID.
static const struct {
    const char *feature;
    unsigned subleaf, at, bits;
} kBits[] = {
    {"avx512", 0, B, BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)},  // F to VL
    {"avx512", 0, C, BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)},  // VBMI to VPOPCNTDQ
    {"avx512", 0, D, BIT(2) | BIT(3) | BIT(8) | BIT(23)},             // 4VNNIW to FP16
    {"avx512", 1, A, BIT(5)},                                         // AVX512_BF16
    {"avx512", 1, D, BIT(19)},                                        // AVX10
    {"amx", 0, D, BIT(22) | BIT(24) | BIT(25)},                       // BF16, TILE, INT8
    {"amx", 1, A, BIT(21)},                                           // FP16
    {"amx", 1, D, BIT(8)},                                            // COMPLEX
    {"vnni", 0, C, BIT(11)},                                          // AVX512_VNNI
    {"vnni", 1, A, BIT(4)},                                           // AVX-VNNI
    {"vnni", 1, D, BIT(4) | BIT(10)},                                 // its INT8 and INT16
    {"bf16", 0, D, BIT(22)},                                          // of AMX
    {"bf16", 1, A, BIT(5)},                                           // AVX512_BF16
    {"bf16", 1, D, BIT(5)},                                           // AVX-NE-CONVERT
};

static unsigned cleared[2][4];  // by subleaf of leaf 7 and register

static int (*libc_sigaction)(int, const struct sigaction *, struct sigaction *);
static sighandler_t (*libc_signal)(int, sighandler_t);
static int (*libc_sigmask)(int, const sigset_t *, sigset_t *);
static struct sigaction of_the_program;  // its own handler of SIGSEGV, as Python's faulthandler and gcc install one

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
    unsigned leaf = (unsigned)at[REG_RAX], subleaf = (unsigned)at[REG_RCX], answer[4];
    syscall(SYS_arch_prctl, ARCH_CPUID, 1);
    __asm__ volatile("cpuid"
                     : "=a"(answer[A]), "=b"(answer[B]), "=c"(answer[C]), "=d"(answer[D])
                     : "a"(leaf), "c"(subleaf));
    syscall(SYS_arch_prctl, ARCH_CPUID, 0);
    for (int i = 0; leaf == 7 && subleaf < 2 && i < 4; i++) answer[i] &= ~cleared[subleaf][i];
    at[REG_RAX] = answer[A], at[REG_RBX] = answer[B], at[REG_RCX] = answer[C], at[REG_RDX] = answer[D];
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

// A cpuid while SIGSEGV is blocked would end the process: nobody may block the signal.
int pthread_sigmask(int how, const sigset_t *wanted, sigset_t *old) {
    sigset_t kept;
    if (wanted && how != SIG_UNBLOCK) {
        kept = *wanted;
        sigdelset(&kept, SIGSEGV);
        wanted = &kept;
    }
    return libc_sigmask(how, wanted, old);
}

int sigprocmask(int how, const sigset_t *wanted, sigset_t *old) {
    int error = pthread_sigmask(how, wanted, old);
    if (error) errno = error;
    return error ? -1 : 0;
}

static int named(const char *feature) {
    const char *hidden = getenv("SPARSIFY_HIDDEN");
    if (!hidden) return 0;
    size_t length = strlen(feature);
    for (const char *at = strstr(hidden, feature); at; at = strstr(at + 1, feature))
        if ((at == hidden || at[-1] == ' ') && (at[length] == ' ' || !at[length])) return 1;
    return 0;
}

__attribute__((constructor)) static void hide(void) {
    for (size_t i = 0; i < sizeof kBits / sizeof kBits[0]; i++)
        if (named(kBits[i].feature) || (!strcmp(kBits[i].feature, "amx") && named("avx512")))
            cleared[kBits[i].subleaf][kBits[i].at] |= kBits[i].bits;
    libc_sigaction = (int (*)(int, const struct sigaction *, struct sigaction *))dlsym(RTLD_NEXT, "sigaction");
    libc_signal = (sighandler_t (*)(int, sighandler_t))dlsym(RTLD_NEXT, "signal");
    libc_sigmask = (int (*)(int, const sigset_t *, sigset_t *))dlsym(RTLD_NEXT, "pthread_sigmask");
    // No SA_ONSTACK: the alternate stack is the program's, which may take it away or make it small.
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    libc_sigaction(SIGSEGV, &ours, NULL);
    if (syscall(SYS_arch_prctl, ARCH_CPUID, 0)) {
        fputs("scripts/hide: nothing can be hidden: this processor or kernel has no cpuid faulting\n", stderr);
        _exit(125);
    }
}
