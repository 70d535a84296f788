//! The allow-list: groups of system calls, each with the reason why programs need it, and the actions for other calls.

use nix::libc;

use crate::sandbox::seccomp::{Action, Check, Rule};

/// Calls that are allowed with any arguments.
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
    // mknod is for FIFOs and sockets. Devices need a capability that programs do not have.
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
    // ptrace is for LeakSanitizer, which stops other threads with it, and for debuggers. Processes of other sandboxes
    // have no pid in this namespace.
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
        "rights: programs read or drop their own, and cannot gain any",
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
        "local sockets, as the rule for socket(2) allows them: asyncio, multiprocessing, node's workers and children",
        "bind listen accept accept4 connect getsockname getpeername getsockopt sendto recvfrom sendmsg recvmsg \
         sendmmsg recvmmsg shutdown",
    ),
    (
        "System V's shared memory, semaphores and queues: charged to the cgroup, gone with the IPC namespace",
        "shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl",
    ),
];

/// Calls that return success and do nothing. Programs write nothing to a disk. These calls would write out, drop from
/// memory or read ahead pages of the host, or of the image, which other sandboxes read too.
pub const NO_OPS: &str = "fsync fdatasync sync syncfs sync_file_range fadvise64 readahead";

/// Calls for extended attributes, which fail as on a file system without attributes. ACLs, which are attributes, take
/// memory that no cgroup counts, and each new file inherits them.
pub const ATTRIBUTES: &str = "setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr \
    flistxattr removexattr lremovexattr fremovexattr";

/// Flags of clone that create a namespace.
pub const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Requests of ioctl for terminals (read by isatty of every C library, set by shells and readline) and for any
/// descriptor. Not allowed are TIOCSTI, which inserts input for other processes, and requests for sockets, file systems
/// or other devices.
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

/// Options of prctl that concern the calling process alone: names, death signals, dumps, its own huge pages, permission
/// to trace it. Not allowed are seccomp (filters use up the host's limit for compiled BPF), names of memory areas
/// (kernel memory that no cgroup counts), core scheduling (keeps other sandboxes off a core) and merging of pages
/// (costs CPU time of the host, and timing reveals which pages are merged).
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

/// All commands of fcntl except for two groups: leases, notifications and hints for the disk, which concern a file and
/// not a descriptor; and open file description locks, which every sandbox sees and no cgroup counts. Init limits the
/// locks of processes.
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

/// Options of local sockets. Filters (SO_ATTACH_FILTER and similar) are not allowed: they are compiled, and the host
/// has one limit for all compiled BPF.
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

/// Advice of madvise about the program's own memory. Not allowed is advice that moves pages of files that other
/// sandboxes use (COLD, PAGEOUT) or makes the kernel search for equal pages (MERGEABLE).
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

/// Barriers of membarrier among the program's own threads, for garbage collectors: QUERY, PRIVATE_EXPEDITED and
/// SYNC_CORE with their registrations. The others interrupt every CPU of the host.
const BARRIERS: &[u32] = &[0, 1 << 3, 1 << 4, 1 << 5, 1 << 6];

/// Flags of `preadv2` and `pwritev2`: RWF_NOWAIT and RWF_APPEND. RWF_DONTCACHE would drop pages of an image.
const READ_WRITE_FLAGS: u32 = 0x8 | 0x10;

/// Personalities: that of Linux itself, and the query for the current one.
const PERSONALITIES: &[u32] = &[0, u32::MAX];

/// Rules for calls whose arguments decide.
pub fn arguments() -> impl Iterator<Item = (&'static str, Rule)> {
    let number = |values: &[libc::c_int]| values.iter().map(|value| value.cast_unsigned()).collect::<Vec<u32>>();
    let bits = |bits: libc::c_int| bits.cast_unsigned();
    let one_of = |argument, values: &[u32], refused| {
        Rule::Where(vec![vec![Check::is(argument, values)]], Action::Errno(refused))
    };
    let without =
        |argument, bits, refused| Rule::Where(vec![vec![Check::without(argument, bits)]], Action::Errno(refused));
    let direct = bits(libc::O_DIRECT);
    let local = || one_of(0, &[bits(libc::AF_UNIX)], libc::EAFNOSUPPORT);
    // The request is an unsigned int to the kernel.
    let ioctls: Vec<u32> = IOCTLS.iter().map(|request| *request as u32).collect();
    let fcntl = vec![
        vec![Check::is(1, &number(FCNTLS))],
        vec![Check::is(1, &[bits(libc::F_SETFL)]), Check::without(2, direct)],
    ];
    // A process that shares a table of open files without being a thread can hide locks there, so init decides.
    let thread = bits(libc::CLONE_THREAD);
    let clone = vec![
        vec![Check::without(0, bits(NAMESPACES | libc::CLONE_FILES))],
        vec![Check::without(0, bits(NAMESPACES)), Check { mask: thread, ..Check::is(0, &[thread]) }],
    ];
    // Init sets RLIMIT_CORE to 1 byte, which keeps the kernel from starting the host's core dump handler. A limit of 0
    // does not, so programs must not change it.
    let core_limit = libc::RLIMIT_CORE;
    let other_than = |argument, value| Check { negated: true, ..Check::is(argument, &[value]) };
    let is_null = |argument| vec![Check::is(argument, &[0]), Check { upper: true, ..Check::is(argument, &[0]) }];
    let socket_option = vec![vec![Check::is(1, &[bits(libc::SOL_SOCKET)]), Check::is(2, &number(SOCKET_OPTIONS))]];
    [
        // The flags of clone are in a register. Those of clone3 are behind a pointer: it is refused, and C libraries
        // fall back to clone.
        ("clone", Rule::Where(clone, Action::Notify)),
        ("setrlimit", Rule::Where(vec![vec![other_than(0, core_limit)]], Action::Errno(0))),
        ("prlimit64", Rule::Where(vec![vec![other_than(1, core_limit)], is_null(2)], Action::Errno(0))),
        // O_DIRECT bypasses the page cache, and would put load on the host's disk.
        ("open", without(1, direct, libc::EINVAL)),
        ("openat", without(2, direct, libc::EINVAL)),
        ("preadv2", without(5, !READ_WRITE_FLAGS, libc::EOPNOTSUPP)),
        ("pwritev2", without(5, !READ_WRITE_FLAGS, libc::EOPNOTSUPP)),
        // None of the cgroup controllers in use counts huge pages.
        ("mmap", without(3, bits(libc::MAP_HUGETLB), libc::ENOMEM)),
        ("memfd_create", without(1, libc::MFD_HUGETLB, libc::EINVAL)),
        ("shmget", without(2, bits(libc::SHM_HUGETLB), libc::ENOMEM)),
        ("madvise", one_of(2, &number(ADVICE), libc::EINVAL)),
        // Libraries use msync to find out whether memory is mapped. MS_SYNC does nothing, like fsync.
        ("msync", without(2, bits(libc::MS_SYNC), 0)),
        ("membarrier", one_of(0, BARRIERS, libc::EINVAL)),
        ("personality", one_of(0, PERSONALITIES, libc::EINVAL)),
        ("prctl", one_of(0, &number(PRCTLS), libc::EINVAL)),
        ("ioctl", one_of(1, &ioctls, libc::ENOTTY)),
        ("fcntl", Rule::Where(fcntl, Action::Errno(libc::EINVAL))),
        // Programs can use local sockets only: their network namespace has no interface.
        ("socket", local()),
        ("socketpair", local()),
        ("setsockopt", Rule::Where(socket_option, Action::Errno(libc::ENOPROTOOPT))),
    ]
    .into_iter()
}
