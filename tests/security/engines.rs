//! Compares the containers of both engines from inside: every restriction of a podman container also holds in a
//! container of the direct engine.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::harness::code;
use crate::shared::Shared;

/// What a program observes of its container.
#[derive(Debug, Deserialize)]
struct Observed {
    /// Fields of `/proc/PID/status`, of the program and of init.
    status: BTreeMap<String, String>,
    init: BTreeMap<String, String>,
    /// Links of the namespaces, by kind.
    namespaces: BTreeMap<String, String>,
    /// Mounts, by mount point.
    mounts: BTreeMap<String, Mount>,
    /// Hard resource limits by name; -1 is unlimited.
    rlimits: BTreeMap<String, i64>,
    environ: BTreeSet<String>,
    uid_map: String,
    gid_map: String,
    devices: BTreeSet<String>,
    /// Kernel settings that belong to the container's namespaces.
    sysctls: BTreeMap<String, String>,
    init_command: Vec<String>,
    /// Further values, which must be equal.
    same: Value,
}

#[derive(Debug, Deserialize)]
struct Mount {
    kind: String,
    options: BTreeSet<String>,
    /// Whether the mount hides what is at this place.
    masked: bool,
}

const OBSERVE: &str = r"
    import glob, json, os, resource, stat
    def fields(pid):
        names = ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb', 'NoNewPrivs', 'Seccomp', 'Seccomp_filters', 'Groups']
        lines = [line.rstrip('\n').split(':\t') for line in open(f'/proc/{pid}/status')]
        return {line[0]: line[1].strip() for line in lines if line[0] in names}
    mounts = {}
    for line in open('/proc/self/mountinfo'):
        before, after = line.split(' - ')
        number, parent, device, root, place, options = before.split()[:6]
        kind, source, super_options = after.split()
        empty = kind == 'tmpfs' and 'size=0k' in super_options.split(',')
        mounts[place] = {'kind': kind, 'options': options.split(','), 'masked': empty or (root == '/null' and place != '/dev/null')}
    names = [name for name in dir(resource) if name.startswith('RLIMIT_')]
    devices = [path for path in glob.glob('/dev/**', recursive=True)
               if not path.startswith('/dev/fd') and stat.S_ISCHR(os.lstat(path).st_mode) ]
    def read(path):
        try: return open(path).read().strip()
        except OSError as error: return error.strerror
    own = ['kernel/shm_rmid_forced', 'kernel/shmmax', 'kernel/shmall', 'kernel/msgmni', 'kernel/sem', 'kernel/hostname',
           'fs/mqueue/queues_max', 'net/ipv4/ping_group_range', 'net/ipv4/ip_unprivileged_port_start']
    print(json.dumps({
        'status': fields('self'), 'init': fields(1),
        'namespaces': {kind: os.readlink('/proc/self/ns/' + kind) for kind in os.listdir('/proc/self/ns')},
        'mounts': mounts,
        'rlimits': {name: resource.getrlimit(getattr(resource, name))[1] for name in names},
        'environ': read('/proc/self/environ').strip('\0').split('\0'),
        'uid_map': read('/proc/self/uid_map'), 'gid_map': read('/proc/self/gid_map'),
        'devices': devices,
        'sysctls': {name: read('/proc/sys/' + name) for name in own},
        'init_command': read('/proc/1/cmdline').strip('\0').split('\0'),
        'same': [os.getcwd(), os.umask(0), os.getsid(0) == os.getpid(), os.nice(0), os.sched_getscheduler(0),
                 read('/proc/self/oom_score_adj'), read('/proc/1/oom_score_adj'),
                 read('/proc/self/cgroup'), read('/proc/self/attr/current'), sorted(os.listdir('/'))],
    }))
";

fn observe(engine: &str) -> Observed {
    let answer = Shared::patient(engine, "python").run(&code(OBSERVE));
    serde_json::from_str(&answer.run_output).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// The bits of a hexadecimal mask that another mask does not have.
fn extra_bits(mask: &str, other: &str) -> u64 {
    let bits = |text: &str| u64::from_str_radix(text, 16).unwrap_or_else(|error| panic!("{text}: {error}"));
    bits(mask) & !bits(other)
}

#[test]
fn direct_engine_isolates_at_least_as_well_as_podman() {
    let (podman, direct) = (observe("podman"), observe("direct"));
    for (which, of_podman, of_direct) in
        [("program", &podman.status, &direct.status), ("init", &podman.init, &direct.init)]
    {
        for (name, value) in of_podman {
            let (here, what) = (&of_direct[name], format!("{name} of {which}"));
            match name.as_str() {
                name if name.starts_with("Cap") => assert_eq!(extra_bits(here, value), 0, "{what}: {here}, {value}"),
                // The number of filters may differ; the next test compares the system calls themselves.
                "Seccomp_filters" => assert!(here.parse::<u32>().unwrap() > 0, "{what}"),
                _ => assert_eq!(here, value, "{what}"),
            }
        }
    }
    for (name, zero) in [("CapEff", 0), ("CapPrm", 0), ("CapInh", 0), ("CapAmb", 0)] {
        assert_eq!(u64::from_str_radix(&podman.status[name], 16), Ok(zero), "{name}");
    }
    assert_eq!(podman.status["NoNewPrivs"], "1");
    assert_eq!(podman.status["Seccomp"], "2");

    for (name, seen) in [("podman", &podman), ("direct", &direct)] {
        for kind in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
            let host = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
            assert_ne!(seen.namespaces[kind], host.to_str().unwrap(), "the {kind} namespace of {name}");
        }
        for (place, mount) in &seen.mounts {
            let writable = ["/work", "/tmp", "/dev/shm"].contains(&place.as_str());
            if writable {
                assert!(mount.kind == "tmpfs" && mount.options.contains("nodev"), "{place} of {name}: {mount:?}");
                assert!(mount.options.contains("nosuid"), "{place} of {name}: {mount:?}");
            }
        }
        assert!(seen.mounts["/"].options.contains("ro"), "{name}");
    }

    for (place, here) in &direct.mounts {
        let there = podman.mounts.get(place).unwrap_or_else(|| panic!("{place} is mounted only by direct: {here:?}"));
        assert_eq!(here.kind, there.kind, "{place}");
        for restriction in ["ro", "nosuid", "nodev", "noexec"] {
            let lost = there.options.contains(restriction) && !here.options.contains(restriction);
            assert!(!lost, "{place} is not {restriction}: {here:?}, {there:?}");
        }
    }
    let kept = |place: &&String| place.starts_with("/proc/") || place.starts_with("/sys/");
    for place in podman.mounts.keys().filter(kept) {
        let masked = podman.mounts[place].masked;
        let above = |other: &&String| other.len() > 1 && Path::new(place).starts_with(other);
        // A masked directory masks everything in it.
        let here = direct.mounts.keys().filter(above).map(|other| &direct.mounts[other]).find(|mount| mount.masked);
        let here = here.or(direct.mounts.get(place)).unwrap_or_else(|| panic!("{place} is covered only by podman"));
        assert!(here.masked >= masked, "{place} is masked only by podman");
    }

    for (name, limit) in &podman.rlimits {
        let here = direct.rlimits[name];
        assert!(*limit == -1 || (0..=*limit).contains(&here), "{name}: {here}, {limit}");
    }
    assert_eq!(direct.environ, podman.environ);
    assert_eq!((direct.uid_map, direct.gid_map), (podman.uid_map, podman.gid_map));
    let more: Vec<_> = direct.devices.difference(&podman.devices).collect();
    assert!(more.is_empty(), "{more:?}");
    assert_eq!(direct.sysctls, podman.sysctls);
    assert_eq!(direct.same, podman.same);
    assert_eq!(podman.init_command, ["/run/coderunner-init", "init"]);
    assert_eq!(direct.init_command, ["coderunner", "agent"]);
}

/// Tries each system call with invalid arguments, in a process of its own, and prints the error.
const CALLS: &str = r#"
    #include <errno.h>
    #include <signal.h>
    #include <stdio.h>
    #include <sys/time.h>
    #include <sys/wait.h>
    #include <unistd.h>
    int main(void) {
        setvbuf(stdout, 0, _IOFBF, 65536);
        for (long call = 0; call < 500; call++) {
            int status = 0;
            fflush(stdout);
            // A child that the timer killed may not have reached the call. Try again with more time.
            for (int again = 0; again < 2; again++) {
                pid_t child = fork();
                if (child == 0) {
                    struct itimerval soon = {{0, 0}, {again ? 2 : 0, again ? 0 : 200000}};
                    setitimer(ITIMER_REAL, &soon, 0);
                    errno = 0;
                    _exit(syscall(call, -1, -1, -1, -1, -1, -1) == -1 ? errno : 0);
                }
                waitpid(child, &status, 0);
                if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGALRM) break;
            }
            printf("%ld %d\n", call, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
        }
        return 0;
    }
"#;

#[test]
fn direct_allows_no_system_call_that_podman_refuses() {
    let [podman, direct] = ["podman", "direct"].map(|engine| {
        let answer = Shared::patient(engine, "c").run(&code(CALLS));
        let line = |line: &str| -> Option<(u32, i32)> {
            let (call, how) = line.split_once(' ')?;
            Some((call.parse().ok()?, how.parse().ok()?))
        };
        let calls: BTreeMap<u32, i32> = answer.run_output.lines().map_while(line).collect();
        assert_eq!(calls.len(), 500, "{answer:?}");
        calls
    });
    let refused = |how: &i32| [nix::libc::EPERM, nix::libc::ENOSYS].contains(how);
    for (call, how) in podman.iter().filter(|(_, how)| refused(how)) {
        assert!(refused(&direct[call]), "call {call}: {} by direct, {how} by podman", direct[call]);
    }
    let count = |calls: &BTreeMap<u32, i32>| calls.values().filter(|how| refused(how)).count();
    assert!(count(&podman) > 100, "{podman:?}");
}
