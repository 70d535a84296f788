//! Runs one stage: starts its program, watches it until it ends or exceeds a limit, and kills all of its processes.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::host::cgroup::Counters;
use crate::model::outcome::Ended;
use crate::sandbox::init::counters::usage;
use crate::sandbox::init::reap::Reaped;
use crate::sandbox::init::spawn::SpawnError;
use crate::sandbox::init::tracers::{self, Listener};
use crate::sandbox::init::{Init, locks, processes, workdir};
use crate::sandbox::protocol::{self, FromInit, StageSpec, ToInit};

/// Most processes to reap between two checks of the limits: a program can create them as fast as init reaps them.
const MAX_REAPS: usize = 64;

/// Shortest time between two checks of the CPU time.
const CPU_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Time between two checks of the memory, if the request's limit is lower than the container's.
const MEMORY_CHECK_INTERVAL: Duration = Duration::from_millis(10);

impl Init {
    /// Runs one stage to its end and returns the reply to the server; `None` if the server has exited in the meantime.
    pub(super) fn run_stage(&mut self, spec: &StageSpec, pipes: [OwnedFd; 3]) -> io::Result<Option<FromInit>> {
        let Some(ids) = self.ids else {
            return Ok(Some(FromInit::Failed("a stage message came before the sources".into())));
        };
        let before = self.cgroup.counters();
        let started = Instant::now();
        let spawned = self.spawner.spawn(spec, &pipes, ids, self.cgroup.enforced().processes);
        let mut reaped = Reaped::of(spawned.as_ref().ok().map(|(main, _)| *main));
        // The programs hold their own copies now. The pipes must close when the programs close them.
        drop(pipes);
        let ended = match spawned {
            Ok((main, listener)) => {
                let watch = Watch::new(self, spec, main, listener, started, &before, &mut reaped)?;
                match watch.until_ended()? {
                    Some(ended) => ended,
                    None => return Ok(None),
                }
            }
            Err(SpawnError::Program(error)) => {
                Ended::NotStarted(format!("cannot start {:?}: {error}", spec.argv.first()))
            }
            Err(SpawnError::Init(error)) => {
                return Ok(Some(FromInit::Failed(format!("cannot start a stage: {error}"))));
            }
        };
        let wall = started.elapsed();
        self.kill_all(&mut reaped)?;
        let after = self.cgroup.counters();
        if after.starved_since(&before) {
            return Ok(Some(FromInit::HostMemory));
        }
        let artifact = spec.artifact.as_ref().is_none_or(|name| workdir::has_file(name));
        Ok(Some(FromInit::StageEnded { ended, artifact, usage: usage(wall, &before, &after, &reaped) }))
    }
}

/// A running stage: its main process, its limits, and the times of the next checks.
struct Watch<'a> {
    init: &'a mut Init,
    spec: &'a StageSpec,
    before: &'a Counters,
    reaped: &'a mut Reaped,
    main: Pid,
    /// A pidfd, readable when the main process has ended, even if another process has to reap it.
    main_end: OwnedFd,
    /// Receives the filter's notifications; `None` when no program is left that could cause one.
    listener: Option<Listener>,
    deadline: Instant,
    cpu_limit: Duration,
    /// Whether CPU time has to be sampled, because no cgroup counts it.
    samples_cpu: bool,
    next_cpu_check: Instant,
    /// `None` if the request has no memory limit of its own.
    next_memory_check: Option<Instant>,
    next_locks_check: Instant,
    /// Time between two checks of locks.
    locks_check_interval: Duration,
    /// CPU time that the programs had used at the last check of locks.
    cpu_at_locks_check: Duration,
}

/// The events that [`Watch::wait`] has found.
struct Ready {
    message: bool,
    children: bool,
    main_end: bool,
    listener: PollFlags,
}

impl<'a> Watch<'a> {
    fn new(
        init: &'a mut Init,
        spec: &'a StageSpec,
        main: Pid,
        listener: Option<Listener>,
        started: Instant,
        before: &'a Counters,
        reaped: &'a mut Reaped,
    ) -> io::Result<Watch<'a>> {
        let cpu_limit = Duration::from_micros(spec.cpu_time_us);
        Ok(Watch {
            main_end: pidfd_open(rustix_pid(main)?, PidfdFlags::empty())?,
            samples_cpu: init.cgroup.cpu_since(before).is_none(),
            deadline: started + Duration::from_micros(spec.time_us),
            next_cpu_check: started + cpu_limit.min(Duration::from_micros(spec.time_us)) / 4,
            next_memory_check: spec.memory.map(|_| started),
            next_locks_check: started + locks::FIRST_CHECK,
            locks_check_interval: locks::CHECK_INTERVAL,
            cpu_at_locks_check: Duration::ZERO,
            init,
            spec,
            before,
            reaped,
            main,
            listener,
            cpu_limit,
        })
    }

    /// Waits until the main process ends, or the stage exceeds a limit or is killed; `None` if the server has exited.
    fn until_ended(mut self) -> io::Result<Option<Ended>> {
        let mut main_is_dead = false;
        loop {
            let more = self.reap()?;
            if let Some(ended) = self.reaped.main_ended.take() {
                return Ok(Some(ended));
            }
            if main_is_dead && !more {
                // Another program traces the main process, so init cannot reap it before the tracer is dead.
                self.init.kill_all(self.reaped)?;
                return Ok(Some(self.reaped.main_ended.take().unwrap_or(Ended::Killed)));
            }
            let now = Instant::now();
            if let Some(limit) = self.exceeded_limit(now) {
                return Ok(Some(limit));
            }
            let ready = self.wait(now, more)?;
            if ready.children {
                while let Ok(Some(_)) = self.init.children.read_signal() {}
            }
            main_is_dead = ready.main_end;
            self.answer_notification(ready.listener, now);
            if ready.message
                && let ControlFlow::Break(ended) = self.handle_message()?
            {
                return Ok(ended);
            }
        }
    }

    /// Reaps ended processes until the main process is reaped, at most [`MAX_REAPS`]. Returns whether there may be
    /// more.
    fn reap(&mut self) -> io::Result<bool> {
        for _ in 0..MAX_REAPS {
            let more = self.reaped.reap()?;
            if !more || self.reaped.main_ended.is_some() {
                return Ok(more);
            }
        }
        Ok(true)
    }

    /// Makes the checks that are due. Returns the limit that the stage has exceeded, if any.
    fn exceeded_limit(&mut self, now: Instant) -> Option<Ended> {
        if now >= self.deadline {
            return Some(Ended::WallTime);
        }
        if self.samples_cpu {
            self.reaped.samples.sample(processes::pids);
            if self.reaped.samples.cpu() >= self.cpu_limit {
                return Some(Ended::CpuTime);
            }
        }
        if now >= self.next_cpu_check {
            let counted = self.init.cgroup.cpu_since(self.before);
            let used = counted.unwrap_or_else(|| self.reaped.cpu + processes::cpu());
            if used >= self.cpu_limit {
                return Some(Ended::CpuTime);
            }
            // Even all CPUs together need this long to use the rest of the limit.
            self.next_cpu_check = now + ((self.cpu_limit - used) / cpus()).max(CPU_CHECK_INTERVAL);
        }
        if let (Some(limit), Some(check)) = (self.spec.memory, self.next_memory_check.as_mut())
            && now >= *check
        {
            if self.init.cgroup.memory_in_use().unwrap_or_else(processes::memory) > limit {
                return Some(Ended::Memory);
            }
            *check = now + MEMORY_CHECK_INTERVAL;
        }
        if now >= self.next_locks_check {
            if self.may_hold_more_locks() && locks::are_too_many() {
                return Some(Ended::Memory);
            }
            self.next_locks_check = now + self.locks_check_interval;
        }
        None
    }

    /// Whether the programs may hold many more locks than at the last check: making them takes CPU time.
    fn may_hold_more_locks(&mut self) -> bool {
        let used = self.init.cgroup.cpu_since(self.before).unwrap_or_else(|| self.reaped.samples.cpu());
        // After a clone that can hide locks, they have to be seen before the process that made them ends.
        let hides_locks = self.locks_check_interval < locks::CHECK_INTERVAL;
        let has_run = used >= self.cpu_at_locks_check + locks::CPU_BETWEEN;
        if has_run {
            self.cpu_at_locks_check = used;
        }
        has_run || hides_locks
    }

    /// Waits for a message, an ended process, a notification of the filter, or the next check. Does not block if `more`
    /// processes may have ended.
    fn wait(&self, now: Instant, more: bool) -> io::Result<Ready> {
        let other_checks = [Some(self.next_locks_check), self.next_memory_check, self.reaped.samples.next()];
        let next_check = other_checks.into_iter().flatten().fold(self.next_cpu_check, Instant::min);
        let wait = match more {
            true => Duration::ZERO,
            false => self.deadline.min(next_check).saturating_duration_since(now) + Duration::from_millis(1),
        };
        let poll_fd = |fd| PollFd::new(fd, PollFlags::POLLIN);
        // Without a listener another descriptor takes its place in the list, and its events there are ignored.
        let listener = self.listener.as_ref().map_or(self.main_end.as_fd(), |listener| listener.as_fd());
        let watched = [self.init.channel.as_fd(), self.init.children.as_fd(), self.main_end.as_fd(), listener];
        let mut fds = watched.map(poll_fd);
        match poll(&mut fds, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Ready {
            message: fds[0].any().unwrap_or(true),
            children: fds[1].any().unwrap_or(true),
            main_end: fds[2].any().unwrap_or(true),
            listener: fds[3].revents().unwrap_or(PollFlags::empty()),
        })
    }

    /// Answers a notification of the filter about a call of a program.
    fn answer_notification(&mut self, ready: PollFlags, now: Instant) {
        if ready.contains(PollFlags::POLLHUP) {
            // No process uses the filter any more. The kernel reports this as soon as the last one begins to end.
            // Without this, `poll` would report it all the time until that process has ended.
            self.listener = None;
        } else if ready.contains(PollFlags::POLLIN) && self.listener.as_mut().is_some_and(Listener::answer) {
            self.locks_check_interval = tracers::LOCKS_CHECK_INTERVAL;
            self.next_locks_check = now;
        }
    }

    /// Handles a message of the server during a stage. Breaks if it ends the stage, with `None` if the server has
    /// exited.
    fn handle_message(&mut self) -> io::Result<ControlFlow<Option<Ended>>> {
        match protocol::receive(self.init.channel.as_fd())? {
            None => Ok(ControlFlow::Break(None)),
            Some((ToInit::Kill, _)) => Ok(ControlFlow::Break(Some(Ended::Killed))),
            Some((ToInit::Signal(number), _)) => {
                if let Ok(signal) = Signal::try_from(number) {
                    // The main process may have ended already, which is no error.
                    let _ = kill(self.main, signal);
                }
                Ok(ControlFlow::Continue(()))
            }
            Some((other, _)) => Err(io::Error::other(format!("unexpected message during a stage: {other:?}"))),
        }
    }
}

fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1))
}

/// Converts a pid to the type of the rustix crate.
fn rustix_pid(pid: Pid) -> io::Result<rustix::process::Pid> {
    rustix::process::Pid::from_raw(pid.as_raw()).ok_or_else(|| io::Error::other("a process has the pid 0"))
}

#[cfg(test)]
mod tests;
