//! Makes sandboxes of a [`Plan`], inside podman's user namespace: what an OCI runtime does, without starting one.
//!
//! What all sandboxes of a plan share is laid out once, in a mount namespace that holds nothing else: a [`Mould`]. A
//! sandbox is a copy of this process that takes a copy of that namespace, puts there what is its own, gives up every right
//! that init does not need, and is init.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Gid, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, pivot_root, setgroups, sethostname, setsid};
use oci_spec::runtime::PosixRlimitType;
use rustix::fs::{CWD, statvfs};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, mount_remount, move_mount, open_tree,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_name, set_no_new_privs,
};
use seccompiler::{BpfProgram, sock_filter};
use tokio::io::unix::AsyncFd;

use crate::host::at;
use crate::host::print;
use crate::sandbox::direct::oci_plan::{DEV, DEVICES, Kind, LINKS, Place, Plan, What};
use crate::sandbox::{init, seccomp};

/// Among the flags of a [`Place`].
const READ_ONLY: u32 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits();

/// Hides a file.
const NULL: &str = "/dev/null";

/// The name of a sandbox's init among processes.
const NAME: &CStr = c"coderunner-init";

/// The libc crate's is too small for its value.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Most that is read of what a child said, in bytes.
const SAID: usize = 4096;

/// What all sandboxes of a plan share.
pub struct Mould {
    plan: Plan,
    /// podman's, for init.
    filter: BpfProgram,
    /// Ours, for programs.
    programs: BpfProgram,
    /// The namespace with its mounts.
    mounts: File,
    /// By which podman's mount of the image is known: it goes with the template, which somebody may delete.
    device: u64,
}

/// What is a sandbox's own.
pub struct Own<'a> {
    /// Its job directory, as seen here.
    pub job_dir: &'a Path,
    /// Its network namespace.
    pub network: &'a File,
    /// Its cgroup.
    pub cgroup: Option<OwnedFd>,
    /// Init's end of its channel.
    pub channel: OwnedFd,
}

impl Mould {
    /// Lays out what sandboxes share. It is of use when the child has ended well.
    pub fn make(plan: Plan) -> io::Result<(Mould, Child)> {
        let (wait, go) = io::pipe()?;
        let mut go = Some(go);
        // A network without anything, of which /sys tells, and a /proc without processes.
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
        let child = Child::spawn(namespaces, None, || {
            drop(go.take());
            // Until the other copy of it is dropped.
            let _ = (&wait).read(&mut [0]);
            lay_out(&plan)
        })?;
        let mounts = File::open(format!("/proc/{}/ns/mnt", child.pid))?;
        drop(go);
        let device = fs::metadata(&plan.root)?.dev();
        let filter = plan.filter.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
        Ok((Mould { plan, filter, programs: seccomp::filter(), mounts, device }, child))
    }

    /// Makes a sandbox. The rest is told by its init.
    pub fn stamp(&self, own: Own<'_>) -> io::Result<Child> {
        // A namespace for cgroups begins at the cgroup that its maker is in: that one comes later.
        let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let cgroup = own.cgroup.as_ref().map(AsRawFd::as_raw_fd);
        Child::spawn(namespaces, cgroup, || {
            self.furnish(&own)?;
            self.give_up()?;
            // Nobody is to close it once more at the end: its number may be another's by then.
            let Own { channel, cgroup, .. } = own;
            drop(cgroup);
            // SAFETY: whatever else is open here is the agent's, copied with all of its memory. This process ends by _exit,
            // without going back to any of it.
            unsafe { init::live(channel, environment(&self.plan), self.programs.clone()) }
        })
    }

    /// Takes this process to a place of its own.
    fn furnish(&self, own: &Own<'_>) -> io::Result<()> {
        let plan = &self.plan;
        if fs::metadata(&plan.root).map_or(true, |root| root.dev() != self.device) {
            return Err(io::Error::other("its template or image was deleted"));
        }
        let job = at("the job directory", bound(own.job_dir))?;
        at("its network", setns(own.network, CloneFlags::CLONE_NEWNET))?;
        at("its mounts", setns(&self.mounts, CloneFlags::CLONE_NEWNS))?;
        at("its namespaces", unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP))?;
        for place in plan.mounts.iter().filter(|place| place.is_own()) {
            match &place.what {
                What::New(kind, parameters) => {
                    let made = at(kind.name(), new(*kind, parameters, place.flags))?;
                    if *kind == Kind::Proc {
                        at("the mould's /proc", umount2(&place.at, MntFlags::MNT_DETACH))?;
                    }
                    attach(&made, place)?;
                }
                What::Job => attach(&job, place)?,
                What::Bound(_) => {}
            }
        }
        for (setting, value) in &plan.sysctls {
            at(setting.display(), fs::write(setting, value))?;
        }
        cover(plan, is_of_processes)?;
        at("its name", sethostname(&plan.hostname))?;
        if let Some(score) = plan.oom_score {
            at("its OOM score", fs::write("/proc/self/oom_score_adj", score.to_string()))?;
        }
        Ok(())
    }

    /// Gives up whatever init does not need.
    fn give_up(&self) -> io::Result<()> {
        let plan = &self.plan;
        for &(limit, soft, hard) in &plan.rlimits {
            at(limit, setrlimit(resource(limit), soft, hard))?;
        }
        umask(Mode::from_bits_truncate(plan.umask));
        init::default_signals();
        setsid()?;
        let groups: Vec<Gid> = plan.groups.iter().copied().map(Gid::from_raw).collect();
        at("its groups", setgroups(&groups))?;
        let kept = CapabilitySet::from_bits_retain(plan.capabilities);
        clear_ambient_capability_set()?;
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if kept.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                // The kernel knows no more.
                Err(rustix::io::Errno::INVAL) => break,
                removed => at("its capabilities", removed)?,
            }
        }
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        at("its capabilities", set_capabilities(None, sets))?;
        set_no_new_privs(true)?;
        set_name(NAME)?;
        seccompiler::apply_filter(&self.filter).map_err(io::Error::other)
    }
}

/// Tries what the kernel may refuse, whatever the image.
pub fn rehearse() -> io::Result<Child> {
    Child::spawn(libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET, None, || {
        at("mounts", mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))?;
        for kind in [Kind::Proc, Kind::Sysfs, Kind::Tmpfs, Kind::Devpts] {
            at(kind.name(), new(kind, &[], 0))?;
        }
        at(NULL, bound(Path::new(NULL))).map(drop)
    })
}

/// Makes a mount namespace of the image and of what is the same in all sandboxes of a plan.
fn lay_out(plan: &Plan) -> io::Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    at("mounts", mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))?;
    let root = at(plan.root.display(), bound(&plan.root))?;
    // Before podman's are out of sight: the kernel makes no /proc and no /sys where there is none.
    let make = |place| Ok((place, make(place)?));
    let made: Vec<(&Place, Option<File>)> = plan.mounts.iter().map(make).collect::<io::Result<_>>()?;
    let device = |name| at(name, bound(&Path::new(DEV).join(name)));
    let devices: Vec<File> = DEVICES.into_iter().map(device).collect::<io::Result<_>>()?;

    at(plan.root.display(), move_to(&root, &plan.root))?;
    chdir(&plan.root)?;
    at("the image", pivot_root(".", "."))?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;

    for (place, made) in &made {
        let is_file = match made {
            Some(made) => !made.metadata()?.is_dir(),
            None => false,
        };
        at(place.at.display(), make_room(&place.at, is_file))?;
        if let Some(made) = made {
            attach(made, place)?;
        }
        if place.at == Path::new(DEV) {
            for (name, device) in DEVICES.into_iter().zip(&devices) {
                let path = place.at.join(name);
                // Read-only: what is written to a device passes, but nobody changes the times of the host's own file.
                let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC;
                let mounted = || move_to(device, &path).and_then(|()| restrict(&path, flags));
                at(path.display(), File::create(&path).and_then(|_| Ok(mounted()?)))?;
            }
            LINKS.into_iter().try_for_each(|(name, target)| symlink(target, place.at.join(name)))?;
        }
    }
    cover(plan, |path| !is_of_processes(path))?;
    let closed = MountFlags::RDONLY | MountFlags::NOSUID;
    at("the image", restrict(Path::new("/"), closed | MountFlags::NODEV))?;
    at(DEV, restrict(Path::new(DEV), closed | MountFlags::NOEXEC | MountFlags::NODEV))
}

/// What a mould has at a place; `None` where each sandbox brings its own. A /proc it needs too, or there could be no other.
fn make(place: &Place) -> io::Result<Option<File>> {
    match &place.what {
        What::New(kind, parameters) if !place.is_own() || *kind == Kind::Proc => {
            // Others are mounted below it first.
            let flags = if place.at == Path::new(DEV) { place.flags & !READ_ONLY } else { place.flags };
            at(kind.name(), new(*kind, parameters, flags)).map(Some)
        }
        What::Bound(source) => at(source.display(), bound(source)).map(Some),
        What::New(..) | What::Job => Ok(None),
    }
}

/// A new file system, mounted nowhere yet.
fn new(kind: Kind, parameters: &[(String, String)], flags: u32) -> rustix::io::Result<File> {
    let made = fsopen(kind.name(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    parameters.iter().try_for_each(|(name, value)| fsconfig_set_string(&made, name.as_str(), value.as_str()))?;
    fsconfig_create(&made)?;
    fsmount(&made, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(flags)).map(File::from)
}

/// A file or directory, to be mounted at another place too.
fn bound(source: &Path) -> rustix::io::Result<File> {
    open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).map(File::from)
}

fn move_to(made: &File, path: &Path) -> rustix::io::Result<()> {
    move_mount(made, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn attach(made: &File, place: &Place) -> io::Result<()> {
    at(place.at.display(), move_to(made, &place.at))?;
    match &place.what {
        // With these from the start.
        What::New(..) => Ok(()),
        What::Bound(_) | What::Job => {
            let flags = MountFlags::from_bits_truncate(place.flags) | MountFlags::NOSUID | MountFlags::NODEV;
            at(place.at.display(), restrict(&place.at, flags))
        }
    }
}

/// Adds to the flags that a mount has: those that the host gave it have to stay.
fn restrict(path: &Path, flags: MountFlags) -> rustix::io::Result<()> {
    // The four have the same numbers everywhere.
    let four = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let held = u32::try_from(statvfs(path)?.f_flag.bits()).unwrap_or(0);
    mount_remount(path, MountFlags::BIND | flags | (MountFlags::from_bits_truncate(held) & four), "")
}

/// Sees that there is something to mount on.
fn make_room(path: &Path, for_file: bool) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if for_file {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        File::create(path).map(drop)
    } else {
        fs::create_dir_all(path)
    }
}

/// Hides what is to be hidden, and lets nobody write where nobody may, of the paths that are meant.
fn cover(plan: &Plan, is_meant: impl Fn(&Path) -> bool) -> io::Result<()> {
    let mut empty: Option<&Path> = None;
    for path in plan.masked.iter().filter(|path| is_meant(path)) {
        let is_dir = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            found => at(path.display(), found)?.is_dir(),
        };
        let cover = match empty {
            _ if !is_dir => bound(Path::new(NULL)),
            Some(empty) => bound(empty),
            None => {
                let size = ("size".to_owned(), "0k".to_owned());
                let closed = MountAttrFlags::MOUNT_ATTR_RDONLY
                    | MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                new(Kind::Tmpfs, &[size], closed.bits())
            }
        };
        at(path.display(), cover.and_then(|cover| move_to(&cover, path)))?;
        if is_dir {
            empty = Some(path);
        } else {
            at(path.display(), restrict(path, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC))?;
        }
    }
    for path in plan.readonly.iter().filter(|path| is_meant(path)) {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = match open_tree(CWD, path, flags) {
            Err(rustix::io::Errno::NOENT) => continue,
            opened => File::from(at(path.display(), opened)?),
        };
        let closed = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        at(path.display(), move_to(&tree, path).and_then(|()| restrict(path, closed)))?;
    }
    Ok(())
}

fn is_of_processes(path: &Path) -> bool {
    path.starts_with("/proc")
}

fn environment(plan: &Plan) -> init::Environment {
    let split = |variable: &String| variable.split_once('=').map(|(name, value)| (name.into(), value.into()));
    plan.environment.iter().filter_map(split).collect()
}

fn resource(of: PosixRlimitType) -> Resource {
    match of {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

/// A copy of this process, until it has ended.
pub struct Child {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    said: PipeReader,
}

impl Child {
    /// Makes a copy of this process in new namespaces, and in a cgroup. It lives `life` and ends; what it says on stderr
    /// is kept. It has nothing else for standard input and output.
    fn spawn(
        namespaces: libc::c_int,
        cgroup: Option<RawFd>,
        life: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Child> {
        let (said, says) = io::pipe()?;
        let nothing = File::options().read(true).write(true).open(NULL)?;
        let mut pidfd: RawFd = -1;
        let flags = namespaces | libc::CLONE_PIDFD;
        // SAFETY: these are numbers, for which zero is a value: none.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        how.flags = u64::from(flags.cast_unsigned());
        how.pidfd = (&raw mut pidfd) as u64;
        how.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
        if let Some(cgroup) = cgroup {
            how.flags |= CLONE_INTO_CGROUP;
            how.cgroup = u64::from(cgroup.cast_unsigned());
        }
        // SAFETY: as fork(2): the copy has all of our memory to itself, and there is no lock in it that another thread
        // holds, for the agent has no other thread. The kernel writes to `pidfd` and nothing else.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut how, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(Errno::last().into()),
            0 => {
                let life = || {
                    dup2_stdin(&nothing)?;
                    dup2_stdout(&nothing)?;
                    dup2_stderr(&says)?;
                    life()
                };
                // A panic has said itself what it is, and goes no further: beyond are the agent's affairs.
                let lived = catch_unwind(AssertUnwindSafe(life)).unwrap_or_else(|_| Err(io::Error::other("a panic")));
                let code = lived.map_or_else(
                    |error| {
                        print::complain(&error.to_string());
                        libc::EXIT_FAILURE
                    },
                    |()| libc::EXIT_SUCCESS,
                );
                // SAFETY: it ends this process, whose memory nobody else uses.
                unsafe { libc::_exit(code) }
            }
            pid => {
                let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
                // SAFETY: the kernel has just made it for us, and nobody else knows it. An OwnedFd is one and the same
                // descriptor until it is dropped.
                let pidfd = unsafe { AsyncFd::register(OwnedFd::from_raw_fd(pidfd)) }.inspect_err(|_| {
                    let _ = kill(pid, Signal::SIGKILL);
                })?;
                Ok(Child { pid, pidfd, said })
            }
        }
    }

    /// Kills it, and with it all of its sandbox.
    pub fn kill(&self) {
        // Its number is nobody else's before its end is asked for. Gone already is as good.
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    /// Waits for its end; an error is the end of what it said, and its status.
    pub async fn end(&mut self) -> Result<(), String> {
        let status = loop {
            let mut ready = self.pidfd.readable().await.map_err(|error| error.to_string())?;
            match waitid(Id::PIDFd(self.pidfd.get_ref().as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => ready.clear_ready(),
                Ok(status) => break status,
                Err(error) => return Err(format!("cannot wait for it: {error}")),
            }
        };
        let status = match status {
            WaitStatus::Exited(_, 0) => return Ok(()),
            WaitStatus::Exited(_, code) => format!("exit status: {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("signal: {signal}"),
            other => format!("{other:?}"),
        };
        // Nobody writes to it any more.
        let mut said = Vec::new();
        let _ = (&self.said).take(SAID as u64).read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        Err(format!("{} ({status})", said.trim()))
    }
}
