//! What a program can see and reach: its own three directories, and nothing of the host, the server, other runs or
//! earlier runs.

use crate::client::Answer;
use crate::harness::{Options, Server, code};
use crate::leftovers::podman;
use crate::shared::Shared;

fn serve(engine: &str, containers: usize) -> Server {
    Server::start(Options {
        languages: &["python"],
        containers,
        config: &format!("engine = \"{engine}\"\n[limits]\nrun_time = \"30s\"\nrun_cpu_time = \"30s\""),
        ..Options::default()
    })
}

on_each_engine! {
    only_three_directories_are_writable
    there_is_no_network
    only_unix_sockets_can_be_created
    programs_have_no_privileges_and_cannot_gain_any
    dangerous_system_calls_are_refused
    programs_cannot_reach_init_or_the_job_directory
    programs_inherit_only_three_pipes
    programs_do_not_see_the_environment_of_the_server
    concurrent_runs_are_isolated_from_each_other
    runs_leave_nothing_for_the_next_run
}

/// Defines `tried(name, call)` for Python programs, which prints the result or the error of a call.
const TRIED: &str = "
import errno

def tried(name, call):
    try:
        print(name, 'worked:', call())
    except OSError as error:
        print(name, errno.errorcode[error.errno])
";

/// Whether a line of `tried` shows a refusal. A filter refuses with ENOSYS, as if the kernel did not have the call.
fn is_refusal(line: &str) -> bool {
    [" EPERM", " EACCES", " ENOSYS"].iter().any(|refusal| line.ends_with(refusal))
}

fn only_three_directories_are_writable(engine: &str) {
    let server = Shared::patient(engine, "python");
    let probe = "
        import os

        def writable(path):
            probe = path + '/probe'
            try:
                os.mkdir(probe)
                os.rmdir(probe)
                return True
            except OSError:
                return False

        found = []
        for path, dirs, files in os.walk('/'):
            # Nothing can be created in the directories of processes, and they come and go.
            if path == '/proc':
                dirs[:] = [name for name in dirs if not name.isdigit()]
            if writable(path):
                found.append(path)
        print(sorted(found))
        for file in '/etc/passwd', '/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/usr/bin/python3':
            try:
                open(file, 'r+b').close()
                print('can write', file)
            except OSError:
                pass
    ";
    assert_eq!(server.run(&code(probe)), Answer::ran("['/dev/shm', '/tmp', '/work']\n"));
}

fn there_is_no_network(engine: &str) {
    let server = Shared::patient(engine, "python");
    let probe = format!(
        "
        import os, socket
        print(os.listdir('/sys/class/net'))
        def connect(family, address):
            try:
                connection = socket.socket(family, socket.SOCK_STREAM)
                connection.settimeout(5)
                connection.connect(address)
                print('reached', address)
            except OSError:
                pass
        for address in '127.0.0.1', '10.0.2.2', '10.0.2.3', '169.254.169.254', '192.168.1.1', '1.1.1.1', '224.0.0.1':
            for port in 53, 80, {port}:
                connect(socket.AF_INET, (address, port))
        for address in '::1', 'fe80::1%lo', 'fd00:ec2::254', '2606:4700:4700::1111', 'ff02::1':
            for port in 53, 80, {port}:
                connect(socket.AF_INET6, (address, port))
        try:
            print(socket.getaddrinfo('example.org', 80))
        except OSError:
            print('no names')
        ",
        port = server.address.port()
    );
    // The /sys of the direct engine shows no network interfaces at all.
    let interfaces = if engine == "podman" { "['lo']" } else { "[]" };
    assert_eq!(server.run(&code(&probe)), Answer::ran(&format!("{interfaces}\nno names\n")));
}

fn only_unix_sockets_can_be_created(engine: &str) {
    let server = Shared::patient(engine, "python");
    // AF_VSOCK ignores network namespaces and would reach the hypervisor; other families are old and little tested.
    let probe = "
        import socket
        made = []
        for family in range(1, 64):
            for kind in range(1, 11):
                for protocol in 0, 1:
                    try:
                        socket.socket(family, kind, protocol).close()
                        made.append(family)
                    except OSError:
                        pass
        print(set(made) == {socket.AF_UNIX})
    ";
    assert_eq!(server.run(&code(probe)), Answer::ran("True\n"));
}

fn programs_have_no_privileges_and_cannot_gain_any(engine: &str) {
    let server = Shared::patient(engine, "python");
    let probe = "
        import os
        print(os.getresuid() == os.getresgid(), min(os.getresuid()) >= 10000, os.getgroups())
        status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)
        for name in 'CapInh', 'CapPrm', 'CapEff', 'CapAmb':
            print(name, int(status[name], 16))
        print(status['NoNewPrivs'].strip(), status['Seccomp'].strip())
        tried('setuid', lambda: os.setuid(0))
        tried('setgroups', lambda: os.setgroups([0]))
        tried('chroot', lambda: os.chroot('/tmp'))
        tried('mknod', lambda: os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0)))
        tried('nice', lambda: os.nice(-1))
    ";
    let answer = server.run(&[TRIED, &code(probe)].concat());
    let (privileges, tried) = answer.run_output.split_once("setuid").unwrap();
    assert_eq!(privileges, "True True []\nCapInh 0\nCapPrm 0\nCapEff 0\nCapAmb 0\n1 2\n");
    assert_eq!(tried.lines().count(), 5);
    for line in tried.lines() {
        assert!(is_refusal(line), "{line}");
    }
}

fn dangerous_system_calls_are_refused(engine: &str) {
    let server = Shared::patient(engine, "python");
    // Calls by number, on x86-64 and on other architectures. A refusal is EPERM or ENOSYS.
    let probe = "
        import ctypes, os, platform
        libc = ctypes.CDLL(None, use_errno=True)
        x86 = platform.machine() == 'x86_64'

        def refused(name, x86_number, number, *args):
            args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
            ctypes.set_errno(0)
            result = libc.syscall(ctypes.c_long(x86_number if x86 else number), *args)
            why = errno.errorcode.get(ctypes.get_errno())
            if result != -1 or why not in ('EPERM', 'ENOSYS'):
                print(name, result, why)

        space = ctypes.create_string_buffer(4096)
        for name, flag in [('user', 0x10000000), ('mount', 0x20000), ('net', 0x40000000), ('pid', 0x20000000)]:
            refused('unshare ' + name, 272, 97, flag)
        refused('clone', 56, 220, 0x10000000 | 17, 0, 0, 0, 0)
        refused('mount', 165, 40, b'none', b'/tmp', b'tmpfs', 0, 0)
        refused('fsopen', 430, 430, b'tmpfs', 0)
        refused('add_key', 248, 217, b'user', b'name', b'data', 4, -4)
        refused('keyctl', 250, 219, 1, b'name')
        refused('request_key', 249, 218, b'user', b'name', 0, 0)
        refused('io_uring_setup', 425, 425, 1, space)
        refused('bpf', 321, 280, 0, space, 128)
        refused('perf_event_open', 298, 241, space, 0, -1, -1, 0)
        refused('userfaultfd', 323, 282, 0)
        refused('kexec_load', 246, 104, 0, 0, 0, 0)
        refused('init_module', 175, 105, space, 0, b'')
        refused('reboot', 169, 142, 0xfee1dead, 672274793, 0x1234567)
        refused('setns', 308, 268, 0, 0x10000000)
        refused('quotactl', 179, 60, 0, 0, 0, 0)
        refused('swapon', 167, 224, b'/tmp/x', 0)
        refused('open_by_handle_at', 304, 265, -100, space, 0)
        refused('ptrace of init', 101, 117, 16, 1, 0, 0)
        print('end')
    ";
    assert_eq!(server.run(&[TRIED, &code(probe)].concat()), Answer::ran("end\n"));
}

fn programs_cannot_reach_init_or_the_job_directory(engine: &str) {
    let server = Shared::patient(engine, "python");
    let probe = "
        import os, resource, signal
        for name in 'environ', 'maps', 'mem', 'auxv', 'io', 'stack', 'syscall':
            tried(name, lambda: open('/proc/1/' + name, 'rb').read(1))
        for name in 'fd', 'fdinfo', 'map_files', 'root/', 'cwd/', 'task/1/fd':
            tried(name, lambda: os.listdir('/proc/1/' + name))
        for name in 'exe', 'root', 'cwd', 'ns/mnt':
            tried(name, lambda: os.readlink('/proc/1/' + name))
        tried('/job', lambda: os.listdir('/job'))
        tried('main.py', lambda: open('/job/main.py').read())
        for number in signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGCHLD, 0:
            tried(f'signal {int(number)}', lambda: os.kill(1, number))
        tried('limits', lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)))
        tried('pidfd', lambda: signal.pidfd_send_signal(os.pidfd_open(1), signal.SIGKILL))
        os.kill(-1, 0) if len([pid for pid in os.listdir('/proc') if pid.isdigit()]) > 2 else None
        print(sorted(int(pid) for pid in os.listdir('/proc') if pid.isdigit()) == [1, os.getpid()])
    ";
    let answer = server.run(&[TRIED, &code(probe)].concat());
    let (tried, alone) = answer.run_output.trim_end().rsplit_once('\n').unwrap();
    assert_eq!(alone, "True", "a program sees only itself and init: {answer:?}");
    assert_eq!(tried.lines().count(), 26);
    for line in tried.lines() {
        assert!(is_refusal(line), "{line}");
    }
}

fn programs_inherit_only_three_pipes(engine: &str) {
    let server = Shared::patient(engine, "python");
    let probe = "
        import os, stat
        kinds = []
        for fd in range(65536):
            try:
                kinds.append((fd, stat.S_ISFIFO(os.fstat(fd).st_mode)))
            except OSError:
                pass
        print(kinds, os.getpid() == os.getsid(0), os.getcwd())
        tried('terminal', lambda: os.open('/dev/tty', os.O_RDWR))
    ";
    assert_eq!(
        server.run(&[TRIED, &code(probe)].concat()),
        Answer::ran("[(0, True), (1, True), (2, True)] True /work\nterminal ENXIO\n")
    );
}

fn programs_do_not_see_the_environment_of_the_server(engine: &str) {
    let server = Server::start(Options {
        languages: &["python"],
        env: &[
            ("SECRET_TOKEN", "hunter2"),
            ("http_proxy", "http://user:hunter2@proxy:3128"),
            ("HTTPS_PROXY", "http://user:hunter2@proxy:3128"),
            ("NO_PROXY", "hunter2"),
            ("PYTHONPATH", "/hunter2"),
        ],
        config: &format!("engine = \"{engine}\"\n[language.python.env]\nMEMORY = \"{{memory}}\""),
        ..Options::default()
    });
    let probe = "
        # The initial environment, without what Python adds.
        print(*sorted(open('/proc/self/environ').read().rstrip('\\0').split('\\0')), sep='\\n')
        print(open('/proc/sys/kernel/hostname').read(), end='')
    ";
    let image = podman(&["image", "inspect", "--format", "{{json .Config.Env}}", "localhost/coderunner-python"]);
    let image: Vec<String> = serde_json::from_str(&image).unwrap();
    let ours = ["HOME=/work", "MEMORY=536870912", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"];
    let mut expected: Vec<&str> = ours.into_iter().chain(image.iter().map(String::as_str)).collect();
    expected.sort_unstable();
    expected.push("sandbox\n");
    assert_eq!(server.run(&code(probe)), Answer::ran(&expected.join("\n")));
    server.stop();
}

fn concurrent_runs_are_isolated_from_each_other(engine: &str) {
    let server = serve(engine, 2);
    // Each program leaves its name wherever it can, again and again, and looks for the name of the other.
    let probe = |own: &str, other: &str| {
        code(&format!(
            "
            import ctypes, os, socket, time
            libc = ctypes.CDLL(None, use_errno=True)
            seen = set()
            listener = socket.socket(socket.AF_UNIX)
            listener.bind('\\0{own}')
            listener.listen()
            segment = libc.shmget(len('{own}'), 4096, 0o1666)
            libc.semget(len('{own}'), 1, 0o1666)
            libc.msgget(len('{own}'), 0o1666)
            os.mkfifo('/tmp/fifo')
            for round in range(30):
                for place in '/work', '/tmp', '/dev/shm':
                    os.makedirs(place + '/{own}', exist_ok=True)
                    if os.path.exists(place + '/{other}'): seen.add(place)
                if len([pid for pid in os.listdir('/proc') if pid.isdigit()]) != 2: seen.add('process')
                if libc.shmget(len('{other}'), 4096, 0o666) != -1: seen.add('segment')
                if socket.socket(socket.AF_UNIX).connect_ex('\\0{other}') == 0: seen.add('abstract socket')
                if libc.semget(len('{other}'), 1, 0o666) != -1: seen.add('semaphore')
                if libc.msgget(len('{other}'), 0o666) != -1: seen.add('messages')
                if '{other}' in open('/proc/net/unix').read(): seen.add('names of sockets')
                for table in 'msg', 'sem', 'shm':
                    if len(open('/proc/sysvipc/' + table).readlines()) != 2: seen.add(table)
                time.sleep(0.1)
            print(segment != -1, seen)
            "
        ))
    };
    let one = server.begin(&probe("one", "other"));
    let other = server.begin(&probe("other", "one"));
    assert_eq!(one.reply().answer(), Answer::ran("True set()\n"));
    assert_eq!(other.reply().answer(), Answer::ran("True set()\n"));
    server.stop();
}

fn runs_leave_nothing_for_the_next_run(engine: &str) {
    // With one container, both runs have the same uid.
    let server = serve(engine, 1);
    let leave = "
        import ctypes, os, subprocess
        for place in '/work', '/tmp', '/dev/shm':
            open(place + '/left', 'w').write('secret')
        libc = ctypes.CDLL(None)
        libc.shmget(77, 4096, 0o1666)
        libc.msgget(77, 0o1666)
        subprocess.Popen(['sleep', '20'], start_new_session=True)
        # A keyring that is linked to the keyring of the uid would outlive its process.
        libc.syscall(250, 1, b'left')
        libc.syscall(250, 8, ctypes.c_long(-3), ctypes.c_long(-4))
        print('left')
    ";
    let look = "
        import ctypes, os
        for place in '/work', '/tmp', '/dev/shm':
            print(os.listdir(place))
        libc = ctypes.CDLL(None)
        print(libc.shmget(77, 4096, 0o666), libc.msgget(77, 0o666))
        print(len([pid for pid in os.listdir('/proc') if pid.isdigit()]))
        print(libc.syscall(250, 10, ctypes.c_long(-4), b'keyring', b'left', 0))
    ";
    assert_eq!(server.run(&code(leave)), Answer::ran("left\n"));
    assert_eq!(server.run(&code(look)), Answer::ran("['main.py']\n[]\n[]\n-1 -1\n2\n-1\n"));
    server.stop();
}
