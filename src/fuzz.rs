//! Fuzz tests of all input from outside: none may make the server panic, hang, or leak a descriptor.
//!
//! `make test` and, longer, `make fuzz` try random bytes and changed valid input. `make libfuzzer` lets libFuzzer
//! choose the bytes by code coverage.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use oci_spec::runtime::Spec;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{Overrides, Settings};
use crate::http::api::batch::BatchRequest;
use crate::http::api::coderunner::CodeRequest;
use crate::http::api::connect::ClientMessage;
use crate::http::api::piston::ExecuteRequest;
use crate::model::job::Job;
use crate::model::language::{self, Language};
use crate::model::limits::Limits;
use crate::sandbox::direct::oci_config::SandboxConfig;
use crate::sandbox::podman::Info;
use crate::sandbox::protocol::{self, FromInit, ToInit};

/// Source limit of the fuzzed requests, in bytes.
const SOURCE_LIMIT: usize = 64;

fn settings(text: &str) -> Result<Settings, crate::config::ConfigError> {
    Settings::from_layers("file", text, &Overrides::default())
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

/// Parses bytes as the body or message of each kind of request. The jobs of accepted requests must be within their
/// bounds.
fn request(body: &[u8], languages: &[Arc<Language>]) {
    fn read<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
        serde_json::from_slice(body).ok()
    }
    let code = read::<CodeRequest>(body).and_then(|asked| asked.into_job(&languages[0], SOURCE_LIMIT).ok());
    let program = |asked: ExecuteRequest| asked.into_job(languages, SOURCE_LIMIT).ok().map(|(_, job)| job);
    let executed = read(body).and_then(program);
    let said = match read(body) {
        Some(ClientMessage::Init(asked)) => program(*asked),
        _ => None,
    };
    let batch = read::<BatchRequest>(body).and_then(|asked| asked.into_batch(languages, SOURCE_LIMIT).ok());
    let jobs = code.into_iter().chain(executed).chain(said).chain(batch.into_iter().flat_map(|batch| batch.jobs));
    jobs.for_each(|job| assert_bounded(&job, languages));
}

fn assert_bounded(job: &Job, languages: &[Arc<Language>]) {
    let language = language::named(languages, &job.language).unwrap();
    let (sent, most) = (job.files.iter().filter(|file| !language.files.contains_key(&file.name)), &language.limits);
    assert!(sent.map(|file| file.content.len()).sum::<usize>() <= SOURCE_LIMIT);
    assert_eq!(job.files[0].name, language.source);
    let names: BTreeSet<&str> = job.files.iter().map(|file| file.name.as_str()).collect();
    assert!(names.len() == job.files.len() && names.iter().all(|name| language::is_file_name(name)), "{names:?}");
    assert!(job.args.iter().all(|arg| !arg.contains('\0')));
    let Limits { output, compile_time, compile_cpu_time, run_time, run_cpu_time, .. } = job.limits;
    assert!(output <= most.output && compile_time <= most.compile_time && run_time <= most.run_time);
    assert!(compile_cpu_time <= most.compile_cpu_time && run_cpu_time <= most.run_cpu_time);
    let memory = [job.memory.compile, job.memory.run];
    assert!(memory.into_iter().flatten().all(|bytes| bytes > 0 && bytes < most.memory.as_u64()));
}

/// Sends a packet with descriptors and receives it. All descriptors must be closed, and a message that was parsed must
/// stay the same when it is sent again.
fn message<T: Serialize + DeserializeOwned>(packet: &[u8], fds: usize) {
    let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let (ours, theirs): (OwnedFd, OwnedFd) = pair();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let raw = vec![writer.as_raw_fd(); fds];
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &control[..0] } else { &control[..] };
    let parts = [std::io::IoSlice::new(packet)];
    sendmsg::<()>(theirs.as_raw_fd(), &parts, control, MsgFlags::empty(), None).unwrap();
    drop((theirs, writer));
    match protocol::receive::<T>(ours.as_fd()) {
        Ok(Some((message, received))) => {
            assert_eq!(received.len(), fds);
            let (ours, theirs) = pair();
            protocol::send(theirs.as_fd(), &message, &[]).unwrap();
            let again: (T, _) = protocol::receive(ours.as_fd()).unwrap().unwrap();
            assert_eq!(json(&again.0), json(&message));
        }
        Ok(None) => assert!(packet.is_empty()),
        Err(_) => {}
    }
    // The read returns once all write ends are closed. A test that hangs here has found a leak.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

/// Parses the output of `podman info`. Without cgroup v2 all controllers must count as missing.
fn podman_info(text: &[u8]) {
    let info = Info::parse(text);
    let known = info.cgroup_version == "v2";
    assert!(known || info.missing_controllers().len() == 3, "without cgroup v2 nothing is limited");
}

/// Parses podman's OCI configuration of a container. An accepted configuration must have the required walls.
fn oci_configuration(text: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Spec>(text) else { return };
    for own_cgroup in [true, false] {
        match SandboxConfig::from_spec(&spec, own_cgroup) {
            Ok(config) => {
                assert!(config.root.is_absolute());
                assert!(config.mounts.iter().all(|mount| mount.destination.is_absolute()));
                assert!(config.sysctls.keys().all(|setting| setting.starts_with("/proc/sys")));
                assert_eq!(spec.process().as_ref().and_then(|process| process.no_new_privileges()), Some(true));
                assert!(!config.filter.is_empty(), "a seccomp filter");
            }
            Err(why) => assert!(!why.is_empty()),
        }
    }
}

fn configuration(text: &str) {
    match settings(text) {
        // Accepted settings can be used, and loaded again from their printed form.
        Ok(accepted) => {
            assert!(!accepted.enabled().unwrap().is_empty());
            let written = toml::to_string(&accepted).unwrap();
            assert!(settings(&written).is_ok(), "{written}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

// The first byte selects the kind of the input.
#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    static C: std::sync::LazyLock<[Arc<Language>; 1]> =
        std::sync::LazyLock::new(|| [Arc::new(settings("").unwrap().language("c").unwrap())]);
    let Some((kind, bytes)) = input.split_first() else { return };
    match kind {
        b'r' => request(bytes, &*C),
        b't' => message::<ToInit>(bytes, bytes.len() % 6),
        b'f' => message::<FromInit>(bytes, bytes.len() % 6),
        b'p' => podman_info(bytes),
        b'o' => oci_configuration(bytes),
        b'c' => configuration(&String::from_utf8_lossy(bytes)),
        _ => {}
    }
});

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::*;
    use crate::model::language;
    use crate::model::outcome::{Ended, Usage};
    use crate::sandbox::direct::oci_config;
    use crate::sandbox::protocol::{Enforced, MAX_MESSAGE, StageSpec};

    /// One change of some bytes.
    #[derive(Debug, Clone)]
    enum Change {
        Replace(Index, u8),
        Insert(Index, Vec<u8>),
        Remove(Index, usize),
        Repeat(Index, usize),
        Cut(Index),
    }

    impl Change {
        fn any() -> impl Strategy<Value = Change> {
            // Any byte, and more often bytes with a meaning in JSON and TOML.
            let byte = prop_oneof![any::<u8>(), select(b"{}[]\",:=\\\n.-0123456789eu".to_vec())];
            let word = select(vec![
                "null",
                "true",
                "-1",
                "1e999",
                "18446744073709551616",
                "\\u0000",
                "\\ud800",
                "[[[[",
                "{\"a\":",
            ]);
            prop_oneof![
                (any::<Index>(), byte).prop_map(|(at, byte)| Change::Replace(at, byte)),
                (any::<Index>(), vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
                (any::<Index>(), word).prop_map(|(at, word)| Change::Insert(at, word.into())),
                (any::<Index>(), 1_usize..20).prop_map(|(at, length)| Change::Remove(at, length)),
                (any::<Index>(), 1_usize..200).prop_map(|(at, length)| Change::Repeat(at, length)),
                any::<Index>().prop_map(Change::Cut),
            ]
        }

        fn apply(&self, bytes: &mut Vec<u8>) {
            let place = |at: &Index| at.index(bytes.len() + 1);
            match self {
                Change::Replace(at, byte) if !bytes.is_empty() => {
                    let at = at.index(bytes.len());
                    bytes[at] = *byte;
                }
                Change::Replace(..) => {}
                Change::Insert(at, new) => {
                    let at = place(at);
                    drop(bytes.splice(at..at, new.iter().copied()));
                }
                Change::Remove(at, length) => {
                    let at = place(at);
                    drop(bytes.drain(at..(at + length).min(bytes.len())));
                }
                Change::Repeat(at, length) => {
                    let at = place(at);
                    let part = bytes[at..(at + length).min(bytes.len())].repeat(3);
                    drop(bytes.splice(at..at, part));
                }
                Change::Cut(at) => bytes.truncate(place(at)),
            }
        }
    }

    /// Random bytes, or changed valid input.
    fn bytes(valid: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
        let changed = (select(valid), vec(Change::any(), 0..6)).prop_map(|(mut bytes, changes)| {
            changes.iter().for_each(|change| change.apply(&mut bytes));
            bytes
        });
        prop_oneof![1 => vec(any::<u8>(), 0..300), 6 => changed]
    }

    fn requests() -> Vec<Vec<u8>> {
        let of = |text: &str| text.as_bytes().to_vec();
        vec![
            of(r#"{"code": "int main(void) { return 0; }"}"#),
            of(r#"{"code":"\u00e4\ud83d\ude00","lang":"c","stdin":[1,2.5e3,null]}"#),
            of(
                r#"{"language":"c","version":">=1","files":[{"content":"int"},{"name":"a/b.h","content":"aGk","encoding":"base64"}],
                "stdin":"1","args":["-x"],"run_timeout":500.5,"compile_cpu_time":1,"run_memory_limit":1048576}"#,
            ),
            of(r#"{"type":"init","language":"c","files":[{"content":"6869","encoding":"hex"}],"run_memory_limit":-1}"#),
            of(r#"{"type":"data","stream":"stdin","data":"x"}"#),
            of(r#"{"language":"c","files":[{"content":"int"}],"stdin":"1",
                "inputs":[{"stdin":"2","expected_output":"4"},{"args":["x"]},{}]}"#),
        ]
    }

    fn to_init() -> Vec<Vec<u8>> {
        let stage = StageSpec {
            argv: vec!["./out".into(), "-x".into()],
            env: vec![("HOME".into(), "/work".into())],
            artifact: Some("out".into()),
            time_us: 5_000_000,
            cpu_time_us: 5_000_000,
            memory: Some(1 << 24),
            open_files: 256,
            file_size: 1 << 26,
            processes: 64,
        };
        let prepare = ToInit::Prepare {
            uid: 10_000,
            user: "maker".into(),
            own_cgroup: true,
            files: vec!["main.c".into(), "a/b.h".into()],
        };
        vec![
            json(&prepare),
            json(&ToInit::Stage(stage)),
            json(&ToInit::Pack { most: 1 << 26 }),
            json(&ToInit::Unpack),
            json(&ToInit::Signal(15)),
            json(&ToInit::Kill),
        ]
    }

    fn from_init() -> Vec<Vec<u8>> {
        let ended = |ended| FromInit::StageEnded { ended, artifact: true, usage: Usage::default() };
        vec![
            json(&FromInit::Ready { version: protocol::VERSION, enforced: Enforced::default() }),
            json(&FromInit::Prepared),
            json(&FromInit::Packed),
            json(&FromInit::NotCarried("why".into())),
            json(&ended(Ended::Exited(3))),
            json(&ended(Ended::NotStarted("no such file".into()))),
            json(&FromInit::HostMemory),
            json(&FromInit::Failed("why".into())),
        ]
    }

    proptest! {
        #[test]
        fn malformed_requests_do_not_panic(body in bytes(requests())) {
            request(&body, &[Arc::new(crate::config::tests::language("c"))]);
        }

        #[test]
        fn malformed_messages_to_init_do_not_panic(packet in bytes(to_init()), fds in 0_usize..6) {
            message::<ToInit>(&packet, fds);
        }

        #[test]
        fn malformed_messages_from_init_do_not_panic(packet in bytes(from_init()), fds in 0_usize..6) {
            message::<FromInit>(&packet, fds);
        }

        #[test]
        fn oversized_packets_do_not_panic(length in MAX_MESSAGE - 8..MAX_MESSAGE + 8, fds in 0_usize..6) {
            message::<FromInit>(&vec![b'0'; length], fds);
        }

        #[test]
        fn messages_with_many_descriptors_do_not_panic(packet in bytes(to_init()), fds in 6_usize..=253) {
            message::<ToInit>(&packet, fds);
        }

        #[test]
        fn malformed_podman_info_does_not_panic(text in bytes(vec![br#"{"host":{"cgroupVersion":"v2","cgroupControllers":["cpu","memory","pids"],
            "ociRuntime":{"version":"crun version 1.8.1\ncommit"}},"store":{"graphDriverName":"overlay",
            "graphStatus":{"Native Overlay Diff":"true"}},"version":{"Version":"4.3.1"}}"#.to_vec()])) {
            podman_info(&text);
        }

        #[test]
        fn malformed_oci_configurations_do_not_panic(text in bytes(vec![oci_config::tests::SPEC.into()])) {
            oci_configuration(&text);
        }
    }

    proptest! {
        // Fewer cases: each loads several layers of settings and the whole catalogue.
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, ..ProptestConfig::default() })]

        #[test]
        fn configurations(text in bytes(vec![
            include_bytes!("config/defaults.toml").to_vec(),
            language::CATALOGUE.as_bytes().to_vec(),
            b"languages = [\"x\"]\n[language.x]\nimage = \"a/b:c\"\nsource = \"m\"\nrun = [\"x\"]\nhealth = { code = \"\", output = \"\" }\n\
              [language.x.limits]\nmemory = \"64MiB\"\ncpus = 0.5\nrun_time = \"3s\"\n".to_vec(),
        ])) {
            configuration(&String::from_utf8_lossy(&text));
        }
    }
}
