//! What is allowed, in groups, each with what needs it; and what is done instead of some calls.

use nix::libc;

use crate::sandbox::seccomp::{Answer, Check, Rule};

/// Allowed whatever their arguments.
pub const ALLOWED: &[(&str, &str)] = &[
    (
        "memory: every allocator, every loader",
        "brk munmap mprotect mremap mincore mlock mlock2 munlock mlockall munlockall mseal pkey_alloc pkey_free \
         pkey_mprotect map_shadow_stack",
    ),
    (
        "reading and writing what is open",
        "read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 pipe pipe2 \
         sendfile splice tee vmsplice copy_file_range ftruncate fallocate flock",
    ),
    // FIFOs and sockets; devices take a capability that nobody has.
    (
        "files and directories: all that a program may open is on tmpfs, read-only, or one of six devices",
        "creat stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 getdents getdents64 \
         getcwd chdir fchdir mkdir mkdirat rmdir rename renameat renameat2 link linkat unlink unlinkat symlink \
         symlinkat readlink readlinkat truncate chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask \
         utime utimes futimesat utimensat mknod mknodat",
    ),
    (
        "waiting for several things: event loops, shells, runtimes with threads",
        "poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd \
         eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime",
    ),
    // LeakSanitizer stops the other threads so; debuggers. No process of another sandbox can be named.
    (
        "processes and threads, their ends, and who they are",
        "fork vfork execve execveat exit exit_group wait4 waitid pidfd_open pidfd_send_signal getpid getppid gettid \
         getpgid getpgrp setpgid getsid setsid set_tid_address set_robust_list get_robust_list rseq futex \
         futex_waitv futex_wake futex_wait futex_requeue arch_prctl getcpu sched_yield sched_getaffinity \
         sched_setaffinity sched_getparam sched_setparam sched_getscheduler sched_setscheduler sched_getattr \
         sched_setattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval getpriority setpriority \
         ioprio_get ptrace",
    ),
    (
        "rights: programs have none to gain, and ask for what they have or give it up",
        "getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid setresuid \
         setresgid setfsuid setfsgid setgroups capget capset",
    ),
    (
        "signals: crash handlers, timers of profilers and collectors",
        "kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigpending rt_sigtimedwait \
         rt_sigqueueinfo rt_tgsigqueueinfo sigaltstack pause alarm getitimer setitimer timer_create timer_settime \
         timer_gettime timer_getoverrun timer_delete restart_syscall",
    ),
    (
        "time, limits, and what kind of machine it is",
        "time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep times getrusage getrlimit uname \
         sysinfo getrandom",
    ),
    (
        "local sockets: what socket(2) allows of them, asyncio, multiprocessing, node's workers and children",
        "bind listen accept accept4 connect getsockname getpeername getsockopt sendto recvfrom sendmsg recvmsg \
         sendmmsg recvmmsg shutdown",
    ),
    (
        "System V's shared memory, semaphores and queues: charged to the cgroup, gone with the IPC namespace",
        "shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl",
    ),
];

/// These return success and do nothing. Nothing that a program writes is on a disk; what they would write out, drop from
/// memory or read ahead is the host's, or the image's, which neighbours read too.
pub const DONE_NOTHING: &str = "fsync fdatasync sync syncfs sync_file_range fadvise64 readahead";

/// Extended attributes: ACLs among them are memory that no cgroup counts, and each new file inherits them. It is as on a
/// file system that has none.
pub const NO_ATTRIBUTES: &str = "setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr \
    flistxattr removexattr lremovexattr fremovexattr";

/// Flags of clone that make a namespace.
pub const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Of terminals (asked for by every C library's isatty, set by shells and readline) and of any descriptor. TIOCSTI, which
/// types for others, is not among them, nor is what belongs to sockets, file systems or other devices.
const IOCTLS: &[libc::Ioctl] = &[
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TCGETS2,
    libc::TCSETS2,
    libc::TCSETSW2,
    libc::TCSETSF2,
    libc::TCSBRK,
    libc::TCSBRKP,
    libc::TCXONC,
    libc::TCFLSH,
    libc::TIOCGWINSZ,
    libc::TIOCSWINSZ,
    libc::TIOCGPGRP,
    libc::TIOCSPGRP,
    libc::TIOCGSID,
    libc::TIOCSCTTY,
    libc::TIOCNOTTY,
    libc::TIOCOUTQ,
    libc::FIONREAD,
    libc::FIONBIO,
    libc::FIOASYNC,
    libc::FIOCLEX,
    libc::FIONCLEX,
];

/// Names, death signals, dumps, huge pages for oneself, who may trace: about the calling process alone. Not among them are
/// seccomp (filters take of the host's bound for compiled BPF), names of memory areas (kernel memory that is not counted),
/// core scheduling (keeps neighbours off a core) and merging of pages (the host works, and time tells what is merged).
const PRCTLS: &[libc::c_int] = &[
    libc::PR_SET_PDEATHSIG,
    libc::PR_GET_PDEATHSIG,
    libc::PR_GET_DUMPABLE,
    libc::PR_SET_DUMPABLE,
    libc::PR_GET_KEEPCAPS,
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_GET_SECCOMP,
    libc::PR_CAPBSET_READ,
    libc::PR_GET_SECUREBITS,
    libc::PR_SET_TIMERSLACK,
    libc::PR_GET_TIMERSLACK,
    libc::PR_SET_CHILD_SUBREAPER,
    libc::PR_GET_CHILD_SUBREAPER,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_SET_THP_DISABLE,
    libc::PR_GET_THP_DISABLE,
    libc::PR_CAP_AMBIENT,
    libc::PR_GET_SPECULATION_CTRL,
    libc::PR_SET_PTRACER,
];

/// All but leases, notifications and hints for the disk, which are about a file and not about a descriptor, and locks of open
/// files, which every sandbox sees and the kernel counts for nobody; those of processes are bounded by init.
const FCNTLS: &[libc::c_int] = &[
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_GETLK,
    libc::F_SETLK,
    libc::F_SETLKW,
    libc::F_GETOWN,
    libc::F_SETOWN,
    F_GETSIG,
    F_SETSIG,
    F_GETOWN_EX,
    F_SETOWN_EX,
    F_DUPFD_QUERY,
    F_CREATED_QUERY,
    libc::F_GETPIPE_SZ,
    libc::F_SETPIPE_SZ,
    libc::F_GET_SEALS,
    libc::F_ADD_SEALS,
];

/// Not in the libc crate for this system (`linux/fcntl.h`).
const F_SETSIG: libc::c_int = 10;
const F_GETSIG: libc::c_int = 11;
const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;
const F_DUPFD_QUERY: libc::c_int = 1027;
const F_CREATED_QUERY: libc::c_int = 1028;

/// What local sockets are asked for. Filters (SO_ATTACH_FILTER and its like) are not: they are compiled, and the host has
/// one bound for all that is.
const SOCKET_OPTIONS: &[libc::c_int] = &[
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_BROADCAST,
    libc::SO_KEEPALIVE,
    libc::SO_LINGER,
    libc::SO_SNDBUF,
    libc::SO_RCVBUF,
    libc::SO_RCVLOWAT,
    libc::SO_SNDLOWAT,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_PASSCRED,
    libc::SO_PEEK_OFF,
];

/// Advice about one's own memory. Not among it is what moves pages of files that neighbours use (COLD, PAGEOUT) or has
/// the kernel look for equal pages (MERGEABLE).
const ADVICE: &[libc::c_int] = &[
    libc::MADV_NORMAL,
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_WILLNEED,
    libc::MADV_DONTNEED,
    libc::MADV_FREE,
    libc::MADV_REMOVE,
    libc::MADV_DONTFORK,
    libc::MADV_DOFORK,
    libc::MADV_UNMERGEABLE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_DONTDUMP,
    libc::MADV_DODUMP,
    libc::MADV_WIPEONFORK,
    libc::MADV_KEEPONFORK,
    libc::MADV_POPULATE_READ,
    libc::MADV_POPULATE_WRITE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
];

/// Not in the libc crate yet (`asm-generic/mman-common.h`, Linux 6.13).
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

/// Barriers among one's own threads, as garbage collectors use them: QUERY, PRIVATE_EXPEDITED and SYNC_CORE with their
/// registrations. The others interrupt every CPU of the host.
const BARRIERS: &[u32] = &[0, 1 << 3, 1 << 4, 1 << 5, 1 << 6];

/// Of reads and writes by `preadv2` and its like: RWF_NOWAIT and RWF_APPEND. RWF_DONTCACHE drops pages of an image.
const READ_WRITE_FLAGS: u32 = 0x8 | 0x10;

/// Linux with its own rules, and the question which they are.
const PERSONALITIES: &[u32] = &[0, u32::MAX];

/// Calls that do many things, by what they are to do.
pub fn arguments() -> impl Iterator<Item = (&'static str, Rule)> {
    let number = |values: &[libc::c_int]| values.iter().map(|value| value.cast_unsigned()).collect::<Vec<u32>>();
    let bits = |bits: libc::c_int| bits.cast_unsigned();
    let one_of = |argument, values: &[u32], refused| {
        Rule::Where(vec![vec![Check::is(argument, values)]], Answer::Errno(refused))
    };
    let without =
        |argument, bits, refused| Rule::Where(vec![vec![Check::without(argument, bits)]], Answer::Errno(refused));
    let direct = bits(libc::O_DIRECT);
    let local = || one_of(0, &[bits(libc::AF_UNIX)], libc::EAFNOSUPPORT);
    // The request is an unsigned int to the kernel.
    let ioctls: Vec<u32> = IOCTLS.iter().map(|request| *request as u32).collect();
    let fcntl = vec![
        vec![Check::is(1, &number(FCNTLS))],
        vec![Check::is(1, &[bits(libc::F_SETFL)]), Check::without(2, direct)],
    ];
    // Whoever shares a table of open files without being a thread can hide locks there: init is asked.
    let thread = bits(libc::CLONE_THREAD);
    let clone = vec![
        vec![Check::without(0, bits(NAMESPACES | libc::CLONE_FILES))],
        vec![Check::without(0, bits(NAMESPACES)), Check { mask: thread, ..Check::is(0, &[thread]) }],
    ];
    // A limit of 1 byte, which init sets, keeps the host's handler of dumps from being started; one of 0 does not.
    let dumps = libc::RLIMIT_CORE;
    let other_than = |argument, value| Check { negated: true, ..Check::is(argument, &[value]) };
    let none = |argument| vec![Check::is(argument, &[0]), Check { upper: true, ..Check::is(argument, &[0]) }];
    let option = vec![vec![Check::is(1, &[bits(libc::SOL_SOCKET)]), Check::is(2, &number(SOCKET_OPTIONS))]];
    [
        // Its flags are in a register; those of clone3 are behind a pointer, and C libraries fall back to this.
        ("clone", Rule::Where(clone, Answer::Ask)),
        ("setrlimit", Rule::Where(vec![vec![other_than(0, dumps)]], Answer::Errno(0))),
        ("prlimit64", Rule::Where(vec![vec![other_than(1, dumps)], none(2)], Answer::Errno(0))),
        // Reading past the page cache is work for the host's disk.
        ("open", without(1, direct, libc::EINVAL)),
        ("openat", without(2, direct, libc::EINVAL)),
        ("preadv2", without(5, !READ_WRITE_FLAGS, libc::EOPNOTSUPP)),
        ("pwritev2", without(5, !READ_WRITE_FLAGS, libc::EOPNOTSUPP)),
        // Huge pages are counted by none of our controllers.
        ("mmap", without(3, bits(libc::MAP_HUGETLB), libc::ENOMEM)),
        ("memfd_create", without(1, libc::MFD_HUGETLB, libc::EINVAL)),
        ("shmget", without(2, bits(libc::SHM_HUGETLB), libc::ENOMEM)),
        ("madvise", one_of(2, &number(ADVICE), libc::EINVAL)),
        // Libraries ask so whether memory is mapped; writing a shared file of the image out is what fsync does.
        ("msync", without(2, bits(libc::MS_SYNC), 0)),
        ("membarrier", one_of(0, BARRIERS, libc::EINVAL)),
        ("personality", one_of(0, PERSONALITIES, libc::EINVAL)),
        ("prctl", one_of(0, &number(PRCTLS), libc::EINVAL)),
        ("ioctl", one_of(1, &ioctls, libc::ENOTTY)),
        ("fcntl", Rule::Where(fcntl, Answer::Errno(libc::EINVAL))),
        // A program is alone in its network namespace, without any interface: local sockets are all that it can use.
        ("socket", local()),
        ("socketpair", local()),
        ("setsockopt", Rule::Where(option, Answer::Errno(libc::ENOPROTOOPT))),
    ]
    .into_iter()
}
