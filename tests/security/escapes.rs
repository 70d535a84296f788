//! Attempts to escape: out of namespaces, into init, into the kernel, and to become root.

use super::{assert_prints, attack};
use crate::client::Answer;
use crate::harness::{Options, Server, code};
use crate::registry::Image;
use crate::shared::Shared;

on_each_engine! {
    system_calls_cannot_escape_the_sandbox
    commands_cannot_escape_the_sandbox
    files_of_the_kernel_and_of_init_cannot_be_written
    setuid_programs_of_the_image_give_no_privileges
    programs_cannot_kill_init
}

fn system_calls_cannot_escape_the_sandbox(engine: &str) {
    let server = Shared::patient(engine, "c");
    // Prints calls that succeed, and calls that fail with an error other than a refusal.
    let calls = r#"
        #define _GNU_SOURCE
        #include <errno.h>
        #include <fcntl.h>
        #include <sched.h>
        #include <signal.h>
        #include <stdint.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/fsuid.h>
        #include <sys/mount.h>
        #include <sys/prctl.h>
        #include <sys/ptrace.h>
        #include <sys/resource.h>
        #include <sys/stat.h>
        #include <sys/swap.h>
        #include <sys/syscall.h>
        #include <sys/sysmacros.h>
        #include <sys/time.h>
        #include <sys/uio.h>
        #include <unistd.h>

        static char page[65536];
        #define REFUSED(call) do { \
            errno = 0; \
            long result = (long)(call); \
            if (result != -1 || (errno != EPERM && errno != EACCES && errno != ENOSYS)) \
                printf("%s: %ld %s\n", #call, result, strerror(errno)); \
        } while (0)

        int main(void) {
            struct iovec here = {page, 64}, there = {(void *)0x400000, 64};
            struct rlimit limit = {1, 1};
            struct sched_param param = {1};
            struct timeval now = {1, 0};
            struct timespec then = {1, 0};
            uint32_t capabilities[6] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u}, version[2] = {0x20080522, 0};
            mkdir("/tmp/a", 0777);

            REFUSED(mount("none", "/tmp", "tmpfs", 0, 0));
            REFUSED(mount("/", "/tmp/a", 0, MS_BIND, 0));
            REFUSED(mount(0, "/", 0, MS_REMOUNT | MS_BIND, 0));
            REFUSED(mount(0, "/proc/sys", 0, MS_REMOUNT | MS_BIND, 0));
            REFUSED(mount(0, "/", 0, MS_PRIVATE | MS_REC, 0));
            REFUSED(mount("proc", "/tmp/a", "proc", 0, 0));
            REFUSED(mount("sysfs", "/tmp/a", "sysfs", 0, 0));
            REFUSED(mount("cgroup2", "/tmp/a", "cgroup2", 0, 0));
            REFUSED(umount2("/proc/keys", MNT_DETACH));
            REFUSED(umount2("/work", MNT_DETACH));
            REFUSED(umount2("/", MNT_DETACH));
            REFUSED(syscall(SYS_pivot_root, "/tmp", "/tmp/a"));
            REFUSED(chroot("/tmp"));
            REFUSED(syscall(428, AT_FDCWD, "/", 1));
            REFUSED(syscall(429, AT_FDCWD, "/tmp/a", AT_FDCWD, "/tmp", 0));
            REFUSED(syscall(430, "tmpfs", 0));
            REFUSED(syscall(432, 0, 0, 0));
            REFUSED(syscall(433, AT_FDCWD, "/", 0));
            REFUSED(syscall(442, AT_FDCWD, "/", 0, page, 32));
            for (int flag = 7; flag < 32; flag++)
                if (1u << flag & 0x7e020080u) REFUSED(unshare(1 << flag));
            for (char **name = (char *[]){"cgroup", "ipc", "mnt", "net", "pid", "user", "uts", 0}; *name; name++) {
                sprintf(page, "/proc/1/ns/%s", *name);
                REFUSED(open(page, O_RDONLY));
                sprintf(page, "/proc/self/ns/%s", *name);
                REFUSED(setns(open(page, O_RDONLY), 0));
            }

            REFUSED(ptrace(PTRACE_ATTACH, 1, 0, 0));
            REFUSED(ptrace(PTRACE_SEIZE, 1, 0, 0));
            REFUSED(process_vm_readv(1, &here, 1, &there, 1, 0));
            REFUSED(process_vm_writev(1, &here, 1, &there, 1, 0));
            REFUSED(syscall(438, syscall(434, 1, 0), 3, 0));
            REFUSED(syscall(SYS_kcmp, 1, getpid(), 0, 3, 3));
            REFUSED(syscall(SYS_move_pages, 1, 0, 0, 0, 0, 0));
            REFUSED(syscall(440, syscall(434, 1, 0), &here, 1, 4, 0));
            REFUSED(kill(1, SIGKILL));
            REFUSED(syscall(SYS_tgkill, 1, 1, SIGKILL));
            REFUSED(syscall(SYS_rt_sigqueueinfo, 1, SIGKILL, page));
            REFUSED(prlimit(1, RLIMIT_CPU, &limit, 0));
            REFUSED(setpriority(PRIO_PROCESS, 1, 10));
            REFUSED(sched_setaffinity(1, 8, (void *)page));
            REFUSED(syscall(SYS_ioprio_set, 1, 1, 1 << 13));
            REFUSED(sched_setscheduler(0, SCHED_FIFO, &param));
            REFUSED(setpriority(PRIO_PROCESS, 0, -1));

            REFUSED(setuid(0));
            REFUSED(setgid(0));
            REFUSED(setresuid(0, 0, 0));
            REFUSED(setfsuid(0) == getuid() && setfsuid(-1) == getuid() ? (errno = EPERM, -1) : 0);
            REFUSED(syscall(SYS_setgroups, 1, page));
            REFUSED(syscall(SYS_capset, version, capabilities));
            REFUSED(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 7, 0, 0) ? (errno = EPERM, -1) : 0);
            REFUSED(prctl(PR_SET_SECUREBITS, 0) ? (errno = EPERM, -1) : 0);
            REFUSED(prctl(PR_CAPBSET_DROP, 7) ? (errno = EPERM, -1) : 0);
            REFUSED(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0) ? (errno = EPERM, -1) : 0);
            REFUSED(prctl(PR_SET_SECCOMP, 0, 0) ? (errno = EPERM, -1) : 0);
            REFUSED(chown("/tmp/a", 0, 0));
            REFUSED(mknod("/tmp/disk", S_IFBLK | 0600, makedev(254, 0)));
            REFUSED(mknod("/work/mem", S_IFCHR | 0600, makedev(1, 1)));
            REFUSED(mknod("/dev/shm/kmsg", S_IFCHR | 0600, makedev(1, 11)));

            REFUSED(sethostname("x", 1));
            REFUSED(setdomainname("x", 1));
            REFUSED(settimeofday(&now, 0));
            REFUSED(syscall(SYS_clock_settime, 0, &then));
            REFUSED(swapon("/tmp/a", 0));
            REFUSED(swapoff("/tmp/a"));
            REFUSED(syscall(SYS_reboot, 0xfee1dead, 672274793, 0x1234567, 0));
            REFUSED(syscall(SYS_kexec_load, 0, 0, 0, 0));
            REFUSED(syscall(SYS_init_module, page, 64, ""));
            REFUSED(syscall(SYS_finit_module, 0, "", 0));
            REFUSED(syscall(SYS_delete_module, "ext4", 0));
            REFUSED(syscall(SYS_acct, "/tmp/acct"));
            REFUSED(syscall(SYS_quotactl, 0, 0, 0, 0));
            REFUSED(syscall(SYS_syslog, 3, page, 64));
            REFUSED(syscall(SYS_vhangup));
            REFUSED(syscall(SYS_open_by_handle_at, AT_FDCWD, page, 0));
        #ifdef __x86_64__
            REFUSED(syscall(SYS_iopl, 3));
            REFUSED(syscall(SYS_ioperm, 0x80, 1, 1));
            REFUSED(syscall(320, 0, 0, 0, "", 0));
        #endif
            puts("end");
            return 0;
        }
    "#;
    assert_eq!(attack(&server, "c", &code(calls)), Answer::ran("end\n"));
    // The classic escape from a chroot through an open descriptor fails, because the sandbox root is not a chroot.
    let leak = r#"
        #include <fcntl.h>
        #include <stdio.h>
        #include <sys/stat.h>
        #include <unistd.h>
        int main(void) {
            for (int n = 0; n < 64; n++) chdir("..");
            struct stat root, up;
            stat("/", &root);
            stat(".", &up);
            printf("%d %d\n", root.st_ino == up.st_ino, openat(open("/", O_RDONLY), "../../../etc/shadow", O_RDONLY));
            return 0;
        }
    "#;
    assert_eq!(attack(&server, "c", &code(leak)), Answer::ran("1 -1\n"));
}

fn commands_cannot_escape_the_sandbox(engine: &str) {
    let commands = r#"
        tried() { "$@" >/dev/null 2>&1 </dev/null && echo "worked: $*"; }
        tried mount -t tmpfs none /tmp
        tried mount -o remount,rw /
        tried mount -o bind /proc/1/root /tmp
        tried umount -l /proc/keys
        tried chroot / true
        tried unshare -r true
        tried unshare -m true
        tried nsenter -t 1 -m true
        tried hostname elsewhere
        tried dmesg
        tried mknod /tmp/disk b 254 0
        tried insmod /tmp/x.ko
        tried modprobe loop
        tried swapoff -a
        tried losetup /dev/loop0 /tmp/x
        tried ip link set lo up
        tried ifconfig lo up
        tried su -c true
        tried kill -9 1
        tried renice -n -5 -p $$
        tried sysctl -w kernel.core_pattern=x
        tried cat /proc/1/environ
        tried ls /proc/1/fd/
        tried ls /proc/1/root/
        tried cat /job/main.sh
        tried cat /proc/kcore
        tried cat /proc/kmsg
        tried cat /dev/mem
        tried cat /etc/shadow
        for file in /proc/sysrq-trigger /proc/sys/kernel/hostname /proc/1/oom_score_adj /proc/self/uid_map \
            /sys/fs/cgroup/cgroup.procs /sys/kernel/uevent_helper /etc/passwd /usr/bin/bash /run/coderunner-init \
            /proc/sys/vm/drop_caches /proc/self/setgroups; do
            (echo 1 >"$file") 2>/dev/null && echo "written: $file"
        done
        exec 2>/dev/null
        (exec 3<>/dev/tcp/127.0.0.1/80) && echo connected
        (exec 3<>/dev/udp/127.0.0.1/53) && echo connected
        echo end
    "#;
    assert_prints(engine, "bash", commands, "end\n");
}

fn files_of_the_kernel_and_of_init_cannot_be_written(engine: &str) {
    let walk = "
        import os
        own = {'self', 'thread-self', str(os.getpid())}
        others = [name for name in os.listdir('/proc') if name.isdigit() and name not in own]
        sinks = {'/dev/' + name for name in ('null', 'zero', 'full', 'random', 'urandom')}
        # These can be opened by anyone, but refuse what is written.
        asks = '/attr/', '/timerslack_ns', '/proc/pressure/'
        for top in ['/sys', '/dev'] + ['/proc/' + name for name in os.listdir('/proc') if name not in own]:
            paths = [top] if os.path.isfile(top) else []
            for path, dirs, files in os.walk(top):
                paths += [path + '/' + file for file in files]
            for path in paths:
                if path in sinks or path.startswith(('/dev/fd/', '/dev/std')): continue
                try:
                    opened = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
                    if not any(ask in path for ask in asks): print('opened', path)
                    os.write(opened, b'1')
                    print('written', path)
                except OSError:
                    pass
        print(others)
    ";
    assert_prints(engine, "python", walk, "['1']\n");
}

fn setuid_programs_of_the_image_give_no_privileges(engine: &str) {
    let image = Image::local();
    image.build_with(
        "RUN mkdir -p /usr/local/bin && cp /usr/bin/busybox /usr/local/bin/ && chmod 6755 /usr/local/bin/busybox",
    );
    let server = Server::start(Options {
        languages: &["bash"],
        config: &format!("engine = \"{engine}\"\n[language.bash]\nimage = {:?}", image.name),
        ..Options::default()
    });
    let run = r#"
        stat -c %a /usr/local/bin/busybox
        [ "$(/usr/local/bin/busybox id -u)" = "$(id -u)" ] && [ "$(/usr/local/bin/busybox id -g)" = "$(id -g)" ] && echo same
        cp /usr/bin/busybox /tmp/ && chmod 4755 /tmp/busybox && [ "$(/tmp/busybox id -u)" = "$(id -u)" ] && echo same
        /usr/local/bin/busybox ls /job 2>/dev/null || echo refused
    "#;
    assert_eq!(attack(&server, "bash", &code(run)), Answer::ran("6755\nsame\nsame\nrefused\n"));
    server.stop();
}

fn programs_cannot_kill_init(engine: &str) {
    let server = Shared::patient(engine, "bash");
    let everything = r#"
        (sleep 50 &)
        kill -9 -1
        echo alive
    "#;
    assert_eq!(attack(&server, "bash", &code(everything)), Answer::ran("alive\n"));
    // The stage ends although children with other sessions and closed streams remain.
    let detached = r#"
        echo so far
        exec <&- >&- 2>&-
        for n in 1 2 3; do setsid sh -c 'trap "" 1 2 15; sleep 50' & done
        kill -STOP $!
        exit 3
    "#;
    assert_eq!(attack(&server, "bash", &code(detached)), Answer::ran("so far\n"));
    let signals = "for n in $(seq 64); do kill -$n 1 2>/dev/null && echo sent $n; done; echo end";
    assert_eq!(attack(&server, "bash", signals), Answer::ran("end\n"));
}
