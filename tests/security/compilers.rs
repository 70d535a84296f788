//! Attacks on and through the compiler: it is confined like the program, and the server does not trust its output.

use std::time::Instant;

use serde_json::json;

use super::{attack, attack_at_once, serve};
use crate::client::Answer;
use crate::harness::{PATIENCE, code};
use crate::shared::Shared;

on_each_engine! {
    compiler_cannot_read_files_of_the_host
    expensive_sources_are_cut_off_by_limits
    compiler_is_confined_like_the_program
    artifact_is_run_only_if_it_is_a_regular_program
    malformed_artifacts_never_cause_server_errors
    hostile_builds_copied_to_other_sandboxes_are_harmless
}

/// A language whose compiler executes the source as a shell script.
const SHELL: &str = r#"
    [limits]
    compile_time = "60s"
    [language.made]
    image = "localhost/coderunner-bash:latest"
    source = "main.sh"
    compile = ["sh", "main.sh"]
    artifact = "out"
    run = ["./out"]
    health = { code = "printf '#!/bin/sh\\necho made\\n' >out; chmod +x out", output = "made\n" }
"#;

/// How many attacks run at once, to save neighbours. With a neighbour they need all containers of a shared server.
const AT_ONCE: usize = 3;

/// The server of all attacks in [`SHELL`].
fn shell(engine: &str) -> Shared {
    Shared::start(&["made"], &format!("engine = \"{engine}\"\n{SHELL}"))
}

fn compiler_cannot_read_files_of_the_host(engine: &str) {
    let server = Shared::patient(engine, "c");
    let files = ["/proc/1/environ", "/job/main.c", "/proc/1/maps", "/etc/shadow", "/proc/kcore", "/dev/mem"];
    let sources = files.map(|file| format!("#include \"{file}\"\nint main(void) {{ return 0; }}\n"));
    let answers = sources.chunks(AT_ONCE).flat_map(|sources| attack_at_once(&server, "c", sources));
    for (file, answer) in files.iter().zip(answers) {
        assert_eq!((answer.status, answer.run_output.as_str()), (0, ""), "{file}");
        assert!(answer.compile_output.ends_with(&format!("error: include file '{file}' not found\n")), "{answer:?}");
    }
    // Files that it can read belong to the image, not to the host.
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let own_line =
        users.lines().find(|line| line.split(':').nth(2) == Some(&nix::unistd::getuid().to_string())).unwrap();
    let name = own_line.split(':').next().unwrap();
    let files = ["/etc/passwd", "/proc/self/environ", "/proc/version"];
    let answers = attack_at_once(&server, "c", &files.map(|file| format!("#include \"{file}\"\n")));
    for (file, answer) in files.iter().zip(answers) {
        assert_eq!((answer.status, answer.run_output.as_str()), (0, ""), "{file}");
        assert!(!answer.compile_output.contains(name), "{file}: {answer:?}");
    }
    let incbin = "__asm__(\".incbin \\\"/proc/1/environ\\\"\");\nint main(void) { return 0; }\n";
    assert_eq!(attack(&server, "c", incbin).status, 0);
}

fn expensive_sources_are_cut_off_by_limits(engine: &str) {
    const LIMITS: &str =
        "[limits]\ncompile_time = \"3s\"\ncompile_cpu_time = \"1s\"\noutput_total = \"1MiB\"\ndisk = \"16MiB\"";
    let server = serve(engine, "c", LIMITS);
    let doubling: String = (1..64).map(|n| format!("#define M{n} M{m} M{m}\n", m = n - 1)).collect();
    let sources = [
        ("macros", format!("#define M0 0,\n{doubling}int x[] = {{ M63 }};\nint main(void) {{ return 0; }}\n")),
        ("includes of itself", "#include \"main.c\"\n#include \"main.c\"\n".into()),
        ("a device", "#include \"/dev/zero\"\n".into()),
        ("one without end", "#include \"/dev/urandom\"\n".into()),
        ("a huge program", "char x[1 << 30] = {1};\nint main(void) { return x[5]; }\n".into()),
        ("parentheses", format!("int main(void) {{ return {}1{}; }}\n", "(".repeat(30_000), ")".repeat(30_000))),
        ("blocks", format!("int main(void) {{ {} }}\n", "{".repeat(30_000))),
        ("diagnostics", format!("int main(void) {{ {} return 0; }}\n", "f(;".repeat(15_000))),
        ("warnings", "#warning w\n".repeat(5_000) + "int main(void) { return 0; }\n"),
    ];
    for (what, source) in sources {
        let started = Instant::now();
        let answer = attack(&server, "c", &source);
        assert!(started.elapsed() < PATIENCE, "{what}");
        assert!(answer.compile_output.len() < 300_000, "{what}: {}", answer.compile_output.len());
        // Most of them do not compile; those that do print nothing.
        let printed = answer.run_output.lines().all(|line| line.starts_with("coderunner: "));
        assert!(printed, "{what}: {answer:?}");
    }
    server.stop();
}

fn compiler_is_confined_like_the_program(engine: &str) {
    let server = shell(engine);
    // The same script runs as compiler and as program; both must see the same.
    let look = r#"
        look() {
            grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/self/status
            cat /proc/self/uid_map /proc/self/limits
            cut -d' ' -f5-6 /proc/self/mountinfo
            tr '\0' '\n' </proc/self/environ | sort
            for ns in /proc/self/ns/*; do readlink $ns; done
            pwd; umask; ls /proc/1/fd/ /job 2>&1
            (echo x >/etc/x) 2>/dev/null; ls -A /tmp /dev/shm
        }
        [ "$0" = main.sh ] && cp main.sh out && chmod +x out
        look 2>&1 | grep -v '^Max cpu time'
    "#;
    let answer = attack(&server, "made", &format!("#!/bin/sh\n{}", code(look)));
    assert_eq!(answer.status, 1, "{answer:?}");
    assert!(answer.run_output.contains("NoNewPrivs:\t1"), "{answer:?}");
    assert_eq!(answer.compile_output, answer.run_output);
}

fn artifact_is_run_only_if_it_is_a_regular_program(engine: &str) {
    let server = shell(engine);
    let run = |scripts: &[&str]| -> Vec<Answer> {
        scripts.chunks(AT_ONCE).flat_map(|scripts| attack_at_once(&server, "made", scripts)).collect()
    };
    // The artifact is missing or not a regular file.
    let scripts =
        ["true", "mkdir out", "mkfifo out", "ln -s /bin/sh out", "ln -s out out", "ln -s /run/coderunner-init out"];
    for (script, answer) in scripts.iter().zip(run(&scripts)) {
        assert_eq!((answer.status, answer.run_output.as_str()), (0, ""), "{script}: {answer:?}");
        assert!(answer.compile_output.contains("coderunner: the compiler made no program"), "{script}: {answer:?}");
    }
    // An artifact that cannot be started is an error of the program.
    let scripts = [">out", "echo x >out; chmod 0 out", "echo '#!/x' >out; chmod +x out"];
    for (script, answer) in scripts.iter().zip(run(&scripts)) {
        assert_eq!(answer.status, 1, "{script}: {answer:?}");
        assert!(answer.run_output.contains("cannot start"), "{script}: {answer:?}");
    }
    // Processes that the compiler started are killed before the program runs, and do not delay it.
    let daemon = "(trap '' TERM HUP; while :; do sleep 50; done) & setsid sleep 50 &\n\
                  printf '#!/bin/sh\\nps | grep -c [s]leep\\n' >out; chmod +x out";
    assert_eq!(run(&[daemon])[0].run_output, "0\n");
}

/// An ELF executable of these program headers, each of a type, an offset and a size.
fn elf(headers: &[(u32, u64, u64)], rest: &[u8]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let machine: u16 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
    [2, machine].iter().for_each(|half| elf.extend(half.to_le_bytes()));
    elf.extend(1_u32.to_le_bytes());
    [0x40_0000_u64, 64, 0].iter().for_each(|long| elf.extend(long.to_le_bytes()));
    elf.extend(0_u32.to_le_bytes());
    let count = u16::try_from(headers.len()).unwrap();
    [64, 56, count, 0, 0, 0].iter().for_each(|half| elf.extend(half.to_le_bytes()));
    for (kind, offset, size) in headers {
        [*kind, 5].iter().for_each(|word| elf.extend(word.to_le_bytes()));
        [*offset, 0x40_0000, 0x40_0000, *size, *size, 4096].iter().for_each(|long| elf.extend(long.to_le_bytes()));
    }
    elf.extend(rest);
    elf
}

fn malformed_artifacts_never_cause_server_errors(engine: &str) {
    const LOAD: u32 = 1;
    const INTERPRETER: u32 = 3;
    let server = shell(engine);
    let name = |name: &str| elf(&[(INTERPRETER, 120, name.len() as u64 + 1)], &[name.as_bytes(), b"\0"].concat());
    let elves = [
        ("an interpreter beyond the end", elf(&[(INTERPRETER, 1 << 40, 20)], b"")),
        ("one beyond all numbers", elf(&[(INTERPRETER, u64::MAX, 20)], b"")),
        ("one without an end", elf(&[(INTERPRETER, 120, 4)], b"/bin")),
        ("one too large", elf(&[(INTERPRETER, 120, 1 << 40)], b"/bin/sh\0")),
        ("a long name", name(&"x".repeat(300))),
        ("a longer one", name(&"/x".repeat(2047))),
        ("a directory", name("/")),
        ("a fifo", name("/work/fifo")),
        ("a loop", name("/work/loop")),
        ("itself", name("/work/out")),
        ("no program", name("/etc/passwd")),
        ("init's memory", name("/proc/1/exe")),
        ("a place beyond memory", elf(&[(LOAD, 0, u64::MAX)], b"")),
        ("a part beyond the end", elf(&[(LOAD, 1 << 40, 4096)], b"")),
        ("no parts", elf(&[], b"")),
        ("half a header", elf(&[], b"")[..40].to_vec()),
        ("many headers", elf(&[], b"").into_iter().enumerate().map(|(n, b)| if n == 56 { 255 } else { b }).collect()),
    ];
    let scripts = ["/x", "/work", "/work/out", "/work/fifo", "/work/loop", "/proc/1/exe", "/dev/null", "/job", ""];
    let scripts = scripts.iter().map(|interpreter| format!("#!{interpreter}\n"));
    let long = [format!("#!/{}\n", "x".repeat(300)), format!("#!{}\n", "/x".repeat(3000)), "#!".into()];
    let scripts = scripts.chain(long).map(|text| (text.trim_end().to_owned(), text.into_bytes()));
    let artifacts: Vec<(String, String)> = elves
        .into_iter()
        .map(|(what, elf)| (what.to_owned(), elf))
        .chain(scripts)
        .map(|(what, artifact)| {
            let octal: String = artifact.iter().map(|byte| format!("\\{byte:03o}")).collect();
            (what, format!("mkfifo fifo; ln -s loop loop; printf '{octal}' >out; chmod +x out\n"))
        })
        .collect();
    let (what, sources): (Vec<String>, Vec<String>) = artifacts.into_iter().unzip();
    let answers = sources.chunks(AT_ONCE).flat_map(|sources| attack_at_once(&server, "made", sources));
    for (what, answer) in what.iter().zip(answers) {
        assert_eq!(answer.status, 1, "{what}: {answer:?}");
        assert!(answer.run_output.starts_with("coderunner: "), "{what}: {answer:?}");
    }
    // The writable directories cannot be removed or replaced.
    for places in
        ["chmod 0 /work /tmp /dev/shm", "mv /work /tmp/work", "rmdir /work /tmp", "rm -rf /work /tmp /dev/shm"]
    {
        let script = format!("({places}) 2>/dev/null\nprintf '#!/bin/sh\\necho made\\n' >out; chmod +x out\n");
        assert_eq!(attack(&server, "made", &script).run_output, "made\n", "{places}");
    }
    // A compiler that fills the disks keeps neither its program nor the neighbour from running.
    let full = "printf '#!/bin/sh\\necho made\\n' >out; chmod +x out\n\
                for d in /work /tmp /dev/shm; do cat /dev/zero >$d/x; n=0; while true >$d/$n; do n=$((n+1)); done; done 2>/dev/null\ntrue\n";
    assert_eq!(attack(&server, "made", full).run_output, "made\n");
}

fn hostile_builds_copied_to_other_sandboxes_are_harmless(engine: &str) {
    let server = shell(engine);
    // The build is copied to the other sandboxes of a batch; if that is impossible, each of them compiles.
    for left in [
        "ln -s /proc/1/environ x",
        "ln -s /job d; ln -s / root; ln -s ../../../../run up; ln -s x x",
        "mkfifo x",
        "echo secret >x; chmod 0 x; mkdir locked; echo y >locked/y; chmod 0 locked",
        "cp /bin/sh sh; chmod 6755 sh",
        "ln out hard 2>/dev/null; echo x >x; ln x y",
        "dd if=/dev/zero of=x bs=1 count=1 seek=60000000 2>/dev/null",
        "n=0; while [ $n -lt 3000 ]; do : >f$n || break; n=$((n+1)); done",
        "n=0; while [ $n -lt 300 ]; do mkdir d && cd d || break; n=$((n+1)); done",
        "touch -- -rf '--checkpoint-action=exec=sh' '..x' \"$(printf 'new\\nline')\"; touch -d '1900-01-01' old",
        "rm main.sh; mkdir main.sh",
        "(while :; do echo >late; rm late; done) & sleep 50 &",
    ] {
        let script = format!(
            "printf '#!/bin/sh\\necho made $1\\nid -u >&2\\n[ ! -u sh ] || ./sh -c \"id -u\" >&2\\n' >out\nchmod +x out\n{left}\ntrue\n"
        );
        let body = json!({
            "language": "made", "version": "*", "files": [{"content": script}],
            "inputs": [{"args": ["1"], "expected_output": "made 1"}, {"args": ["2"], "expected_output": "made 2"}],
        });
        let headers = [("Content-Type", "application/json")];
        let reply = server.request("POST", "/api/v2/batch", &headers, body.to_string().as_bytes());
        let answer = reply.json();
        assert_eq!((reply.status, &answer["passed"]), (200, &json!(true)), "{left}: {answer}");
        for result in answer["results"].as_array().unwrap() {
            let users = result["run"]["stderr"].as_str().unwrap();
            assert!(users.lines().all(|user| user != "0"), "{left}: {result}");
        }
    }
    assert_eq!(attack(&server, "made", "printf '#!/bin/sh\\necho made\\n' >out; chmod +x out").run_output, "made\n");
}
