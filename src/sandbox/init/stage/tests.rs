//! These tests reap all children of their process, so each needs one of its own, as nextest gives it.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::*;

/// More than any test takes.
const LONG: Duration = Duration::from_secs(60);

/// A stage whose main process is a child of the test.
struct Stage {
    init: Init,
    /// The server's end of the channel.
    server: Option<OwnedFd>,
    spec: StageSpec,
    main: Pid,
}

impl Stage {
    #[expect(clippy::zombie_processes, reason = "the loop of the stage reaps it")]
    fn start(script: &str) -> Stage {
        assert!(std::env::var_os("NEXTEST").is_some(), "run by `make test`: it reaps all children of its process");
        let (server, channel) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut init = Init::new(channel, Vec::new(), Vec::new()).unwrap();
        init.cgroup.own = false;
        let mut shell = Command::new("sh");
        let child = shell.args(["-c", script]).stdin(Stdio::null()).process_group(0).spawn().unwrap();
        let spec = StageSpec {
            argv: Vec::new(),
            env: Vec::new(),
            artifact: None,
            time_us: protocol::micros(LONG),
            // Never reached: outside a pid namespace all processes of the host are counted.
            cpu_time_us: u64::MAX,
            memory: None,
            open_files: 0,
            file_size: 0,
            processes: 0,
        };
        Stage { init, server: Some(server), spec, main: Pid::from_raw(child.id().cast_signed()) }
    }

    fn send(&self, message: &ToInit) {
        protocol::send(self.server.as_ref().unwrap().as_fd(), message, &[]).unwrap();
    }

    /// Watches the stage to its end, and returns the reaped processes, too.
    fn watch(&mut self) -> (io::Result<Option<Ended>>, Reaped) {
        let (started, before) = (Instant::now(), Counters::default());
        let mut reaped = Reaped::of(Some(self.main));
        let watch = Watch::new(&mut self.init, &self.spec, self.main, None, started, &before, &mut reaped).unwrap();
        let ended = watch.until_ended();
        assert!(started.elapsed() < LONG, "it waited for the deadline");
        (ended, reaped)
    }

    /// How the stage ended.
    fn ended(&mut self) -> Option<Ended> {
        self.watch().0.unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Fails if nothing is left of it.
        let _ = nix::sys::signal::killpg(self.main, Signal::SIGKILL);
    }
}

#[test]
fn stage_ends_with_its_main_process() {
    assert_eq!(Stage::start("exit 3").ended(), Some(Ended::Exited(3)));
    assert_eq!(Stage::start("kill -SEGV $$").ended(), Some(Ended::Signalled(libc::SIGSEGV)));
    // A process that it leaves behind does not keep the stage.
    assert_eq!(Stage::start("sleep 1000 & exit 0").ended(), Some(Ended::Exited(0)));
}

#[test]
fn orphans_are_reaped_and_counted_while_the_main_process_runs() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let orphans = "for n in 1 2 3; do (sh -c 'n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done' &); done; sleep 1";
    let (ended, reaped) = Stage::start(orphans).watch();
    assert_eq!(ended.unwrap(), Some(Ended::Exited(0)));
    assert!(reaped.cpu > Duration::ZERO && reaped.max_rss > 0);
}

#[test]
fn wall_time_limit_ends_the_stage() {
    let mut stage = Stage::start("sleep 1000");
    stage.spec.time_us = 100_000;
    assert_eq!(stage.ended(), Some(Ended::WallTime));
}

#[test]
fn kill_message_ends_the_stage() {
    let mut stage = Stage::start("sleep 1000");
    stage.send(&ToInit::Kill);
    assert_eq!(stage.ended(), Some(Ended::Killed));
}

#[test]
fn signal_message_reaches_the_main_process() {
    let mut stage = Stage::start("exec sleep 1000");
    stage.send(&ToInit::Signal(-1));
    stage.send(&ToInit::Signal(libc::SIGTERM));
    assert_eq!(stage.ended(), Some(Ended::Signalled(libc::SIGTERM)));
}

#[test]
fn stage_has_no_result_once_the_server_is_gone() {
    let mut stage = Stage::start("sleep 1000");
    stage.server = None;
    assert_eq!(stage.ended(), None);
}

#[test]
fn messages_that_do_not_belong_to_a_stage_are_errors() {
    let mut stage = Stage::start("sleep 1000");
    stage.send(&ToInit::Unpack);
    assert!(stage.watch().0.unwrap_err().to_string().contains("Unpack"));
}
