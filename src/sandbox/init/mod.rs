//! PID 1 of a sandbox: runs stages as another uid, keeps their limits, reaps, measures.
//!
//! One thread and one `poll`: the channel, SIGCHLD and the next deadline. It trusts the server and
//! nothing else; programs run as a uid that can neither signal it nor read its memory. When the channel
//! closes it exits, and the kernel kills what is left in its pid namespace.

pub mod carry;
mod groups;
mod landlock;
mod locks;
mod seen;
mod tracers;

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{ptr, slice};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, clone};
use nix::sys::prctl::set_no_new_privs;
use nix::sys::ptrace;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::waitpid;
use nix::unistd::{
    Gid, Pid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, setegid, seteuid, setgroups, setresgid,
    setresuid, setsid,
};
use rustix::fs::{AtFlags, CWD, utimensat};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use rustix::process::{PidfdFlags, pidfd_open};
use seccompiler::BpfProgram;

use crate::host::at;
use crate::host::cgroup::{Counters, field};
use crate::host::print;
use crate::model::outcome::{Ended, Usage};
use crate::sandbox::init::seen::Seen;
use crate::sandbox::protocol::{
    self, CHANNEL_FD, Enforced, FromInit, JOB_DIR, StageSpec, ToInit, VERSION, WORK_DIR, micros,
};
use crate::sandbox::seccomp;
use tracers::Listener;

/// Longest that killed processes may take to die; they can be stuck in the kernel, and then the container goes.
const REAP_TIME: Duration = Duration::from_secs(5);

/// Ended processes that are reaped between two looks at the time: a program can make them as fast as they are.
const REAPS: usize = 64;

/// Shortest time between two looks at the CPU time used.
const CPU_CHECK: Duration = Duration::from_millis(20);

/// Time between two looks at the memory used, where a request allows less than the container.
const MEMORY_CHECK: Duration = Duration::from_millis(10);

/// The tmpfs that programs may write to.
const WRITABLE: [&str; 3] = [WORK_DIR, "/tmp", "/dev/shm"];

/// Where a cgroup v2 container sees its own counters.
const CGROUP: &str = "/sys/fs/cgroup";

/// Variables, by name.
pub type Environment = Vec<(OsString, OsString)>;

/// Init as a program of its own, whose descriptor 3 is the channel.
pub fn main() -> ExitCode {
    // SAFETY: first thing in a process of one thread: it is what the server passed, and nobody else knows it.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) };
    // SAFETY: of what this process has open nobody owns anything but the channel.
    let live = |filter| unsafe { live(channel, std::env::vars_os().collect(), filter) };
    let lived = live(seccomp::filter());
    match lived {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print::complain(&format!("coderunner init: {error}; it is started by the server, not by hand"));
            ExitCode::FAILURE
        }
    }
}

/// Serves the channel until it closes. `environment` is what the image sets, and podman for it; `filter` is that of
/// [`seccomp::filter`]. Whatever else this process has open is closed.
///
/// # Safety
///
/// Who owns a descriptor besides the channel and the three standard ones must neither use nor drop it after this: its number
/// may be another's by then. Of a copy of another process that means that it ends without going back to what that had begun.
pub unsafe fn live(channel: OwnedFd, environment: Environment, filter: BpfProgram) -> io::Result<()> {
    let kept = channel.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: nobody uses or closes what is closed here, as our callers promise.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
    Init::new(channel, environment, filter)?.serve()
}

struct Init {
    channel: OwnedFd,
    children: SignalFd,
    cgroup: Cgroup,
    /// Ready before there is a job, as the next one.
    filter: BpfProgram,
    standard: Standard,
    rules: landlock::Rules,
    ids: Option<(Uid, Gid)>,
    /// Those of the image's user.
    groups: Vec<Gid>,
    /// What every program gets.
    environment: Environment,
    stack: Stack,
    /// Whether something that was killed may still be doing what it had asked the kernel for.
    dying: bool,
}

impl Init {
    fn new(channel: OwnedFd, environment: Environment, filter: BpfProgram) -> io::Result<Init> {
        nix::fcntl::fcntl(&channel, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        // Nobody reads our memory or descriptors through /proc/1.
        nix::sys::prctl::set_dumpable(false)?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let cgroup = Cgroup { own: true };
        let rules = landlock::rules(&WRITABLE).map_err(io::Error::other)?;
        // podman's own marks are not the image's.
        let environment =
            environment.into_iter().filter(|(name, _)| name != "container" && name != "HOSTNAME" && name != "TERM");
        Ok(Init {
            channel,
            children,
            cgroup,
            filter,
            standard: Standard::new()?,
            rules,
            ids: None,
            environment: environment.collect(),
            groups: Vec::new(),
            stack: Stack::new()?,
            dying: false,
        })
    }

    fn serve(mut self) -> io::Result<()> {
        self.send(&FromInit::Ready { version: VERSION, enforced: self.cgroup.enforced() })?;
        while let Some((message, pipes)) = protocol::receive(self.channel.as_fd())? {
            let answer = match message {
                ToInit::Prepare { uid, user, own_cgroup, files } => {
                    self.cgroup.own = own_cgroup;
                    self.groups = groups::of_user(&user, Path::new("/"));
                    match self.prepare(uid, &files) {
                        Ok(()) => FromInit::Prepared,
                        Err(error) => FromInit::Failed(format!("cannot place the sources: {error}")),
                    }
                }
                ToInit::Stage(spec) => match <[OwnedFd; 3]>::try_from(pipes) {
                    Ok(pipes) => match self.stage(&spec, pipes)? {
                        Some(answer) => answer,
                        None => return Ok(()),
                    },
                    Err(_) => FromInit::Failed("a stage without its three pipes".into()),
                },
                ToInit::Pack { most } => match self.pack(most, pipes) {
                    Ok(()) => FromInit::Packed,
                    Err(error) => FromInit::NotCarried(format!("cannot pack what is there: {error}")),
                },
                ToInit::Unpack => match self.unpack(pipes) {
                    Ok(()) => FromInit::Unpacked,
                    Err(error) => FromInit::NotCarried(format!("cannot unpack what was made: {error}")),
                },
                // For a stage that has just ended.
                ToInit::Signal(_) | ToInit::Kill => continue,
            };
            self.send(&answer)?;
        }
        Ok(())
    }

    fn send(&self, message: &FromInit) -> io::Result<()> {
        protocol::send(self.channel.as_fd(), message, &[])
    }

    /// Copies the files into the working directory as the programs' uid, so that they own them.
    fn prepare(&mut self, uid: u32, files: &[String]) -> io::Result<()> {
        self.ids = Some((Uid::from_raw(uid), Gid::from_raw(uid)));
        WRITABLE.iter().try_for_each(|place| at(place, open_to_all(Path::new(place))))?;
        // A tmpfs that anyone can write to, where cgroups are v1; else this fails, and need not be.
        let _ = fs::set_permissions(CGROUP, fs::Permissions::from_mode(0o755));
        let mut contents = Vec::with_capacity(files.len());
        for name in files {
            let source = Path::new(JOB_DIR).join(name);
            contents.push((Path::new(WORK_DIR).join(name), at(source.display(), fs::read(&source))?));
        }
        self.as_programs(|| {
            contents.iter().try_for_each(|(path, content)| {
                path.parent().map_or(Ok(()), fs::create_dir_all)?;
                at(path.display(), fs::write(path, content))
            })
        })
    }

    /// Packs what the programs have left, when every one is dead.
    fn pack(&self, most: u64, pipes: Vec<OwnedFd>) -> io::Result<()> {
        if self.dying {
            return Err(io::Error::other("killed processes do not die"));
        }
        let pipe = the_one(pipes)?;
        self.as_programs(|| carry::pack(&WRITABLE, most, pipe))
    }

    /// Makes what another sandbox's init has packed.
    fn unpack(&self, packed: Vec<OwnedFd>) -> io::Result<()> {
        let packed = the_one(packed)?;
        let times = self.as_programs(|| carry::unpack(&WRITABLE, &packed))?;
        WRITABLE.iter().zip(times).try_for_each(|(place, times)| {
            let place = Path::new(place);
            as_owner(&fs::metadata(place)?, || Ok(utimensat(CWD, place, &times, AtFlags::empty())?))
        })
    }

    /// Does something with the rights of the programs, and no more.
    fn as_programs<T>(&self, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (uid, gid) = self.ids.ok_or_else(|| io::Error::other("there are no programs yet"))?;
        setegid(gid)?;
        seteuid(uid)?;
        let done = act();
        seteuid(Uid::from_raw(0))?;
        setegid(Gid::from_raw(0))?;
        done
    }

    /// Runs one stage to its end; `None` when the server has gone meanwhile.
    fn stage(&mut self, spec: &StageSpec, pipes: [OwnedFd; 3]) -> io::Result<Option<FromInit>> {
        let Some(ids) = self.ids else {
            return Ok(Some(FromInit::Failed("a stage before its sources".into())));
        };
        let before = self.cgroup.counters();
        let started = Instant::now();
        let spawned = spawn(spec, &pipes, ids, self);
        let mut reaped = Reaped::of(spawned.as_ref().ok().map(|(main, _)| *main));
        // The programs hold them now.
        drop(pipes);
        let ended = match spawned {
            Ok((main, listener)) => match self.watch(main, listener, spec, started, &before, &mut reaped)? {
                Some(ended) => ended,
                None => return Ok(None),
            },
            Err(NotSpawned::Program(error)) => {
                Ended::NotStarted(format!("cannot start {:?}: {error}", spec.argv.first()))
            }
            Err(NotSpawned::Init(error)) => {
                return Ok(Some(FromInit::Failed(format!("cannot start a stage: {error}"))));
            }
        };
        let wall = started.elapsed();
        self.kill_all(&mut reaped)?;
        let after = self.cgroup.counters();
        if after.starved_since(&before) {
            return Ok(Some(FromInit::HostMemory));
        }
        let artifact = spec.artifact.as_ref().is_none_or(|name| is_file(&Path::new(WORK_DIR).join(name)));
        Ok(Some(FromInit::StageEnded { ended, artifact, usage: usage(wall, &before, &after, &reaped) }))
    }

    /// Waits until the main process ends or has to be ended.
    fn watch(
        &mut self,
        main: Pid,
        mut listener: Option<Listener>,
        spec: &StageSpec,
        started: Instant,
        before: &Counters,
        reaped: &mut Reaped,
    ) -> io::Result<Option<Ended>> {
        let deadline = started + Duration::from_micros(spec.time_us);
        let cpu_limit = Duration::from_micros(spec.cpu_time_us);
        let mut next_cpu_check = started + cpu_limit.min(Duration::from_micros(spec.time_us)) / 4;
        let mut next_memory_check = spec.memory.map(|_| started);
        let (mut next_locks_check, mut check_locks) = (started + locks::CHECK, locks::CHECK);
        let its_end = pidfd_open(pid_of(main)?, PidfdFlags::empty())?;
        let mut main_is_dead = false;
        let uncounted = self.cgroup.cpu_since(before).is_none();
        loop {
            let mut more = true;
            for _ in 0..REAPS {
                more = reaped.reap()?;
                if reaped.main_ended.is_some() {
                    return Ok(reaped.main_ended.take());
                }
                if !more {
                    break;
                }
            }
            if main_is_dead && !more {
                // Another program traces it, and would have to let it go first.
                self.kill_all(reaped)?;
                return Ok(Some(reaped.main_ended.take().unwrap_or(Ended::Killed)));
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(Some(Ended::WallTime));
            }
            if uncounted {
                reaped.seen.look(living);
                if reaped.seen.cpu() >= cpu_limit {
                    return Ok(Some(Ended::CpuTime));
                }
            }
            if now >= next_cpu_check {
                let used = self.cgroup.cpu_since(before).unwrap_or_else(|| reaped.cpu + living_cpu());
                if used >= cpu_limit {
                    return Ok(Some(Ended::CpuTime));
                }
                // As many CPUs as there are can burn the rest.
                next_cpu_check = now + ((cpu_limit - used) / cpus()).max(CPU_CHECK);
            }
            if let (Some(limit), Some(check)) = (spec.memory, next_memory_check.as_mut())
                && now >= *check
            {
                if self.cgroup.memory_in_use().unwrap_or_else(living_memory) > limit {
                    return Ok(Some(Ended::Memory));
                }
                *check = now + MEMORY_CHECK;
            }
            if now >= next_locks_check {
                if locks::are_too_many() {
                    return Ok(Some(Ended::Memory));
                }
                next_locks_check = now + check_locks;
            }
            let others = [Some(next_locks_check), next_memory_check, reaped.seen.next()].into_iter().flatten();
            let next_check = others.fold(next_cpu_check, Instant::min);
            let wait = match more {
                true => Duration::ZERO,
                false => deadline.min(next_check).saturating_duration_since(now) + Duration::from_millis(1),
            };
            let poll_fd = |fd| PollFd::new(fd, PollFlags::POLLIN);
            // Without a listener one of the others stands twice.
            let asked = listener.as_ref().map_or(its_end.as_fd(), |listener| listener.as_fd());
            let mut fds = [self.channel.as_fd(), self.children.as_fd(), its_end.as_fd(), asked].map(poll_fd);
            match poll(&mut fds, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if fds[1].any().unwrap_or(true) {
                while let Ok(Some(_)) = self.children.read_signal() {}
            }
            main_is_dead = fds[2].any().unwrap_or(true);
            let told = fds[0].any().unwrap_or(true);
            let asked = fds[3].revents().unwrap_or(PollFlags::empty());
            if asked.contains(PollFlags::POLLHUP) {
                // Nobody is left who could ask: the kernel says so as soon as a program begins to end, and again and again
                // until it has ended.
                listener = None;
            } else if asked.contains(PollFlags::POLLIN) && listener.as_mut().is_some_and(Listener::answer) {
                check_locks = tracers::CHECK;
                next_locks_check = now;
            }
            if told {
                match protocol::receive(self.channel.as_fd())? {
                    None => return Ok(None),
                    Some((ToInit::Kill, _)) => return Ok(Some(Ended::Killed)),
                    Some((ToInit::Signal(number), _)) => {
                        if let Ok(signal) = Signal::try_from(number) {
                            // Gone already is as good.
                            let _ = kill(main, signal);
                        }
                    }
                    Some((other, _)) => return Err(io::Error::other(format!("{other:?} during a stage"))),
                }
            }
        }
    }

    /// Kills everything else in this pid namespace and waits until it is gone. What is stuck in the kernel beyond that
    /// runs no program any more, and is no reason to withhold how the stage ended.
    fn kill_all(&mut self, reaped: &mut Reaped) -> io::Result<()> {
        let deadline = Instant::now() + REAP_TIME;
        loop {
            // As PID 1, -1 is everything but ourselves.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            while reaped.reap()? {}
            if reaped.none_left {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.dying = true;
                return Ok(());
            }
            let mut fds = [PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(10u8));
            while let Ok(Some(_)) = self.children.read_signal() {}
        }
    }
}

/// A process by the other crate's type.
fn pid_of(pid: Pid) -> io::Result<rustix::process::Pid> {
    rustix::process::Pid::from_raw(pid.as_raw()).ok_or_else(|| io::Error::other("a process without a number"))
}

/// The one descriptor that came beside a message.
fn the_one(mut fds: Vec<OwnedFd>) -> io::Result<fs::File> {
    match (fds.pop(), fds.pop()) {
        (Some(fd), None) => Ok(fd.into()),
        _ => Err(io::Error::other("a message without its descriptor")),
    }
}

/// Lets every uid write here. podman gives a mount the owner and mode of the image's directory of that name.
fn open_to_all(place: &Path) -> io::Result<()> {
    let meta = fs::metadata(place)?;
    if meta.mode() & 0o7777 == 0o1777 {
        return Ok(());
    }
    as_owner(&meta, || fs::set_permissions(place, fs::Permissions::from_mode(0o1777)))
}

/// Does what only the owner of a place may: we have no capability but to change uids.
fn as_owner(place: &fs::Metadata, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    seteuid(Uid::from_raw(place.uid()))?;
    let done = act();
    seteuid(Uid::from_raw(0))?;
    done
}

/// Why a program was not started.
#[derive(Debug)]
enum NotSpawned {
    /// It is one that the kernel does not start, or there is no room for it in its sandbox.
    Program(io::Error),
    /// What has to be done before could not be done.
    Init(io::Error),
}

impl NotSpawned {
    /// What the kernel said when a process was to become the program.
    fn exec(error: io::Error) -> NotSpawned {
        match error.raw_os_error() {
            // The whole host's files.
            Some(libc::ENFILE) => NotSpawned::Init(error),
            _ => NotSpawned::Program(error),
        }
    }

    /// What went wrong before that.
    fn before(error: impl Into<io::Error>) -> NotSpawned {
        let error = error.into();
        match error.raw_os_error() {
            // The sandbox's memory, which what a program leaves behind counts to.
            Some(libc::ENOMEM) => NotSpawned::Program(error),
            _ => NotSpawned::Init(error),
        }
    }
}

/// Starts the stage's command as `ids`, without anything of ours but the three pipes.
///
/// The child shares our memory until it is the program, as with vfork: a copy of it would cost as much as all else. So
/// it must leave nothing behind that we do not expect, and we stand still meanwhile. It also shares our descriptors: where the
/// filter asks us is then open here, and closed in what becomes the program, which the kernel gives a table of its own.
fn spawn(
    spec: &StageSpec,
    pipes: &[OwnedFd; 3],
    ids: (Uid, Gid),
    init: &mut Init,
) -> Result<(Pid, Option<Listener>), NotSpawned> {
    let program = Program::new(spec, &init.environment).map_err(NotSpawned::Program)?;
    let limits = resource_limits(spec, init.cgroup.enforced().processes);
    let Init { filter, standard, rules, groups, stack, .. } = init;
    let (mut listener, mut failure) = (None, None);
    let child = || {
        failure = Some(match confine(pipes, ids, groups, &limits, filter, rules) {
            Ok(confined) => {
                listener = Some(confined);
                NotSpawned::exec(program.replace_us())
            }
            Err(error) => NotSpawned::before(error),
        });
        libc::EXIT_FAILURE as isize
    };
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_FILES | CloneFlags::CLONE_VFORK;
    // SAFETY: the stack lives as long as the child uses it, for CLONE_VFORK returns when the child is the program or
    // has ended. Nothing else of ours runs meanwhile: this process has one thread. Nobody may look into the memory that
    // the child shares while it is already the programs' uid: it is not dumpable, and no program runs yet.
    let pid = unsafe { clone(Box::new(child), stack.room(), flags, Some(libc::SIGCHLD)) };
    standard.restore().map_err(NotSpawned::before)?;
    let pid = pid.map_err(NotSpawned::before)?;
    match (listener, failure) {
        (Some(listener), None) => Ok((pid, listener)),
        (_, failure) => {
            waitpid(pid, None).map_err(NotSpawned::before)?;
            Err(failure.unwrap_or_else(|| NotSpawned::Init(io::Error::other("a child ended before it was a program"))))
        }
    }
}

/// Our own standard descriptors, kept for when a child has put its pipes in their places.
struct Standard([OwnedFd; 3]);

impl Standard {
    fn new() -> io::Result<Standard> {
        let keep = |fd: BorrowedFd| fd.try_clone_to_owned();
        Ok(Standard([keep(io::stdin().as_fd())?, keep(io::stdout().as_fd())?, keep(io::stderr().as_fd())?]))
    }

    fn restore(&self) -> io::Result<()> {
        take_their_places(&self.0)
    }
}

/// Makes these the standard descriptors.
fn take_their_places([stdin, stdout, stderr]: &[OwnedFd; 3]) -> io::Result<()> {
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    Ok(dup2_stderr(stderr)?)
}

/// Stack of a child in bytes until it is the program. The functions that it runs are not deep, but what they do where
/// something fails is not ours alone; of what is not used the kernel gives nothing.
const CHILD_STACK: usize = 256 * 1024;

/// What is below it and may not be touched, in bytes: a page, of the largest that there are.
const GUARD: usize = 64 * 1024;

/// The stack of children, which begins at its end. One that needs more of it ends by a signal, and overwrites nothing of
/// the memory that it shares with us. Mapped before there is a job, and used by one child at a time.
struct Stack(*mut libc::c_void);

impl Stack {
    fn new() -> io::Result<Stack> {
        let flags = MapFlags::PRIVATE | MapFlags::STACK | MapFlags::NORESERVE;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory, where the kernel has room for it.
        let stack = Stack(unsafe { mmap_anonymous(ptr::null_mut(), GUARD + CHILD_STACK, rights, flags) }?);
        // SAFETY: it is ours, and nobody uses it yet.
        unsafe { mprotect(stack.0, GUARD, MprotectFlags::empty()) }?;
        Ok(stack)
    }

    /// What is above the guard.
    fn room(&mut self) -> &mut [u8] {
        // SAFETY: it is mapped as long as we have it, can be read and written, and is zeros at first. Nobody else has it as
        // long as it is borrowed.
        unsafe { slice::from_raw_parts_mut(self.0.cast::<u8>().add(GUARD), CHILD_STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: whoever borrowed it has given it back.
        let _ = unsafe { munmap(self.0, GUARD + CHILD_STACK) };
    }
}

/// Takes from this process, which is to become a program, what programs do not have.
fn confine(
    pipes: &[OwnedFd; 3],
    (uid, gid): (Uid, Gid),
    groups: &[Gid],
    limits: &[(Resource, u64)],
    filter: &BpfProgram,
    rules: &landlock::Rules,
) -> io::Result<Option<Listener>> {
    take_their_places(pipes)?;
    chdir(WORK_DIR)?;
    // The kernel's first choice at the memory limit, before init.
    fs::write("/proc/self/oom_score_adj", "1000")?;
    for &(resource, value) in limits {
        let higher =
            |error| format!("{resource:?} cannot be {value}: {error}; the server's own may be lower (ulimit -Ha)");
        setrlimit(resource, value, value).map_err(|error| io::Error::other(higher(error)))?;
    }
    setsid()?;
    // They open what the image lets its own user's groups read, and no more: the root directory is read-only, what can be
    // written to is this sandbox's alone, and all that is the server's or init's (the job directory, the channel, the pipes,
    // what /proc tells of PID 1, the cgroup) has group 0, which is never among them. Signals and traces go by uid.
    setgroups(groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    SigSet::empty().thread_set_mask()?;
    default_signals();
    rules.try_clone()?.restrict_self().map_err(io::Error::other)?;
    // Last: it holds from here on.
    set_no_new_privs()?;
    tracers::apply(filter)
}

/// What a child becomes.
struct Program {
    /// Where it may be, in the order of PATH.
    places: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    fn new(spec: &StageSpec, environment: &Environment) -> io::Result<Program> {
        let name = spec.argv.first().ok_or(Errno::ENOENT)?;
        let mut env: BTreeMap<OsString, OsString> = environment.iter().cloned().collect();
        env.insert("HOME".into(), WORK_DIR.into());
        env.extend(spec.env.iter().map(|(name, value)| (name.into(), value.into())));
        let path = env.get(OsStr::new("PATH")).cloned().unwrap_or_else(|| DEFAULT_PATH.into());
        let places = match name.contains('/') {
            true => vec![PathBuf::from(name)],
            false => std::env::split_paths(&path).map(|dir| dir.join(name)).collect(),
        };
        let text = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::from);
        Ok(Program {
            places: places
                .into_iter()
                .map(|place| text(place.into_os_string().into_vec()))
                .collect::<Result<_, _>>()?,
            argv: spec.argv.iter().map(|arg| text(arg.clone().into_bytes())).collect::<Result<_, _>>()?,
            env: env
                .iter()
                .map(|(name, value)| text([name.as_bytes(), b"=", value.as_bytes()].concat()))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Becomes the program, or tells why not: as a shell does, of the last place that says more than that nothing is
    /// there.
    fn replace_us(&self) -> io::Error {
        let mut failure = Errno::ENOENT;
        for place in &self.places {
            let Err(error) = execve(place, &self.argv, &self.env);
            match error {
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => failure = error,
                _ => return error.into(),
            }
        }
        failure.into()
    }
}

/// Where programs are looked for if the image says nothing: the C library's own.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Sets every signal to its default, also 32 and 33: a C library keeps these for itself, lets nobody set them, and
/// leaves them ignored in what it spawns.
pub(crate) fn default_signals() {
    // The kernel's structure, whose zeros are the default action without flags.
    let default = [0_u64; 4];
    for signal in 1..=64_i32 {
        // SAFETY: the kernel reads 32 bytes that are there, and writes nothing. SIGKILL and SIGSTOP fail, as they
        // should.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u64>(), 8_usize) };
    }
}

fn resource_limits(spec: &StageSpec, pids_limited: bool) -> Vec<(Resource, u64)> {
    let mut limits = vec![
        (Resource::RLIMIT_NOFILE, spec.open_files),
        (Resource::RLIMIT_FSIZE, spec.file_size),
        // No file is as small. A kernel that hands dumps to a program of the host's does so at 0, but not at 1.
        (Resource::RLIMIT_CORE, 1),
        // Message queues and queued signals are kernel memory that outlives no limit of ours.
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_SIGPENDING, 1024),
        (Resource::RLIMIT_MEMLOCK, 64 * 1024),
        // Only if this loop were to fail: the kernel's own count, per process, in whole seconds.
        (Resource::RLIMIT_CPU, spec.cpu_time_us.div_ceil(1_000_000) + 1),
    ];
    if !pids_limited {
        // Counted per uid, and the uid is this sandbox's alone. Where there is a pids cgroup it stays
        // out of its way, for only that one tells that it refused a fork.
        limits.push((Resource::RLIMIT_NPROC, spec.processes));
    }
    limits
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
}

fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1))
}

/// What the ended children of a stage used, and how its main process ended.
#[derive(Default)]
struct Reaped {
    cpu: Duration,
    max_rss: u64,
    none_left: bool,
    main: Option<Pid>,
    main_ended: Option<Ended>,
    /// Where no cgroup counts.
    seen: Seen,
}

impl Reaped {
    /// Of a stage with this main process.
    fn of(main: Option<Pid>) -> Reaped {
        Reaped { main, ..Reaped::default() }
    }

    /// Reaps one child that has ended; whether there was one.
    fn reap(&mut self) -> io::Result<bool> {
        let mut status = 0;
        // SAFETY: rusage is plain numbers, for which zero is a value; wait4 writes to these two and
        // nothing else. nix has no wait4, and only it tells the usage of one child.
        let (pid, rusage) = unsafe {
            let mut rusage: libc::rusage = std::mem::zeroed();
            (libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut rusage), rusage)
        };
        match pid {
            0 => Ok(false),
            -1 => match Errno::last() {
                Errno::ECHILD => {
                    self.none_left = true;
                    Ok(false)
                }
                Errno::EINTR => self.reap(),
                error => Err(error.into()),
            },
            pid if libc::WIFSTOPPED(status) => {
                // It asked to be traced by its parent. We do not trace, and a stop is no end.
                let signal = Signal::try_from(libc::WSTOPSIG(status)).ok().filter(|signal| *signal != Signal::SIGTRAP);
                let _ = ptrace::detach(Pid::from_raw(pid), signal);
                Ok(true)
            }
            pid => {
                let time = |t: libc::timeval| {
                    Duration::new(t.tv_sec.unsigned_abs(), u32::try_from(t.tv_usec).unwrap_or(0) * 1000)
                };
                self.cpu += time(rusage.ru_utime) + time(rusage.ru_stime);
                self.max_rss = self.max_rss.max(rusage.ru_maxrss.unsigned_abs() * 1024);
                if self.main == Some(Pid::from_raw(pid)) {
                    self.main_ended = Some(match libc::WIFSIGNALED(status) {
                        true => Ended::Signalled(libc::WTERMSIG(status)),
                        false => Ended::Exited(libc::WEXITSTATUS(status)),
                    });
                }
                Ok(true)
            }
        }
    }
}

/// Each process but init itself. Of the names that are no numbers two stand for whoever looks: init, with all that it has
/// reaped.
fn living() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != 1).map(Pid::from_raw)
}

/// This file of each of them. The name of a process, which is in some, need not be text.
fn of_the_living(file: &str) -> impl Iterator<Item = String> {
    let read = move |pid: Pid| fs::read(format!("/proc/{pid}/{file}")).ok();
    living().filter_map(read).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Memory of the processes that still run, for hosts without a cgroup that counts it: what is theirs alone, and
/// what a fork shares with its parent once for each.
fn living_memory() -> u64 {
    // Of programs only processes have a statm of numbers; in pages, the second is what is resident, the third
    // what of it belongs to files.
    let pages = |statm: String| -> Option<u64> {
        let mut fields = statm.split_whitespace().skip(1).map(str::parse::<u64>);
        let (resident, shared) = (fields.next()?.ok()?, fields.next()?.ok()?);
        Some(resident.saturating_sub(shared))
    };
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(4096);
    of_the_living("statm").filter_map(pages).sum::<u64>() * page
}

/// CPU time of the processes that still run, for hosts without a cgroup that counts it.
fn living_cpu() -> Duration {
    let ticks: u64 = of_the_living("stat")
        .filter_map(|stat| {
            // Fields 14 to 17, counted behind the command's name, which may hold anything: its own, and that of the
            // children that it has waited for.
            let times = stat.rsplit(')').next()?.split_whitespace().skip(11).take(4);
            times.map(|time| time.parse::<u64>().ok()).sum::<Option<u64>>()
        })
        .sum();
    // USER_HZ is 100 on every Linux that /proc shows to user space.
    Duration::from_millis(ticks * 10)
}

/// The counters of the container's own cgroup, as far as there are any.
struct Cgroup {
    /// Whether what is seen here is its own.
    own: bool,
}

impl Cgroup {
    fn enforced(&self) -> Enforced {
        let is_set = |name: &str| self.read(name).is_some_and(|text| !text.starts_with("max"));
        Enforced { memory: is_set("memory.max"), processes: is_set("pids.max"), cpu: is_set("cpu.max") }
    }

    fn counters(&self) -> Counters {
        if self.own { Counters::read(Path::new(CGROUP)) } else { Counters::default() }
    }

    /// What cannot be given back: memory of processes and files of a tmpfs, but no cached pages of the image.
    fn memory_in_use(&self) -> Option<u64> {
        Some(self.field("memory.stat", "anon")? + self.field("memory.stat", "shmem")?)
    }

    fn cpu_since(&self, before: &Counters) -> Option<Duration> {
        Some(Duration::from_micros(self.field("cpu.stat", "usage_usec")?).saturating_sub(before.cpu?))
    }

    fn read(&self, name: &str) -> Option<String> {
        self.own.then(|| fs::read_to_string(Path::new(CGROUP).join(name)).ok())?
    }

    fn field(&self, file: &str, name: &str) -> Option<u64> {
        field(&self.read(file)?, name)
    }
}

fn usage(wall: Duration, before: &Counters, after: &Counters, reaped: &Reaped) -> Usage {
    let cpu = match (before.cpu, after.cpu) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        // Either knows of some that the other one does not.
        _ => reaped.cpu.max(reaped.seen.cpu()),
    };
    // The peak is that of the container's whole life: a stage that did not raise it stayed below.
    let memory = match (before.peak, after.peak) {
        (Some(before), Some(after)) if after > before => after,
        _ => reaped.max_rss,
    };
    Usage {
        wall_us: micros(wall),
        cpu_us: micros(cpu),
        memory,
        oom_kills: after.oom_kills.saturating_sub(before.oom_kills),
        forks_refused: after.forks_refused.saturating_sub(before.forks_refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_the_stack_of_children_is_what_nobody_may_touch() {
        let mut stack = Stack::new().unwrap();
        let room = stack.room();
        room.fill(1);
        let lowest = room.as_ptr().addr();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let holds = |line: &&str| {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let address = |text| usize::from_str_radix(text, 16).unwrap();
            (address(from)..address(to)).contains(&(lowest - 1))
        };
        let below = maps.lines().find(holds).unwrap();
        assert!(below.contains(" ---p "), "{below}");
    }
}
