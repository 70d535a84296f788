//! Checks of the host and of podman that need no sandbox.

use std::path::PathBuf;

use crate::cli::account::AS_ACCOUNT;
use crate::cli::doctor::report::{Check, Report};
use crate::config::Settings;
use crate::host::instance;
use crate::sandbox::podman::{Info, Podman};

/// Number of ids that containers of an ordinary image need: the user's own and 65,536 subordinate ones.
const IDS: u64 = 65_537;

/// The oldest podman version known to support all options that we use: that of Debian 12.
const OLDEST_PODMAN: (u32, u32) = (4, 3);

/// Name of the check of the cgroup controllers that limits need.
pub(super) const CGROUPS: &str = "cgroups";

/// Makes all checks. Returns the output of `podman info`, if podman works.
pub(super) async fn check(settings: &Settings, report: &mut Report) -> Option<Info> {
    let uid = nix::unistd::geteuid();
    report.add(
        Check::new("user", "an ordinary user", format!("uid {uid}"))
            .fail_unless(!uid.is_root(), format!("systemctl start coderunner; {AS_ACCOUNT} doctor")),
    );
    let runtime = instance::runtime_dir();
    let seen = runtime.as_ref().map_or_else(ToString::to_string, |dir| dir.display().to_string());
    report.add(
        Check::new("runtime directory", "owned by this user", seen).fail_unless(
            runtime.is_ok(),
            format!("loginctl enable-linger {uid}; export XDG_RUNTIME_DIR=/run/user/{uid}"),
        ),
    );
    let podman = Podman::new(&settings.podman);
    let oldest = format!("{}.{} or newer", OLDEST_PODMAN.0, OLDEST_PODMAN.1);
    let info = match podman.info().await {
        Ok(info) => info,
        Err(error) => {
            let fix = "apt-get install podman crun uidmap";
            report.add(Check::new("podman", oldest, error.to_string()).fail_unless(false, fix));
            return None;
        }
    };
    let mut numbers = info.version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let new_enough = version >= OLDEST_PODMAN;
    report.add(
        Check::new("podman", oldest, &info.version)
            .fail_unless(new_enough, "apt-get install podman, of Debian 12 or later"),
    );
    let crun = info.runtime.contains("crun");
    report.add(Check::new("OCI runtime", "crun", &info.runtime).fail_unless(crun, "apt-get install crun"));
    let native = info.native_overlay.map_or("", |native| if native { ", native" } else { ", not native" });
    report.add(Check::new("storage", "overlay", format!("{}{native}", info.driver)).fail_unless(
        info.driver == "overlay",
        "printf '[storage]\\ndriver = \"overlay\"\\n' >~/.config/containers/storage.conf; podman system reset",
    ));
    let ids = podman.mapped_ids().await;
    let seen = ids.as_ref().map_or_else(ToString::to_string, |count| format!("{count} ids"));
    report.add(Check::new("subordinate ids", format!("{IDS} ids"), seen).fail_unless(
        ids.is_ok_and(|count| count >= IDS),
        format!("as root: {} USER; then podman system migrate", shipped("subids", "packaging/subids").display()),
    ));
    let controllers = match info.controllers.join(" ") {
        none if none.is_empty() => "no controllers".to_owned(),
        some => some,
    };
    report.add(
        Check::new(CGROUPS, "v2 with cpu, memory, pids", format!("{} with {controllers}", info.cgroup_version))
            .fail_unless(info.missing_controllers().is_empty(), limits_fix(info)),
    );
    Some(info.clone())
}

/// The path of a file that coderunner ships: as installed with this executable, else in the source tree.
pub(super) fn shipped(name: &str, source: &str) -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    let installed = executable.ancestors().nth(2).map(|prefix| prefix.join("lib/coderunner").join(name));
    installed.filter(|file| file.exists()).unwrap_or_else(|| source.into())
}

/// How to make this host able to limit rootless containers.
pub(super) fn limits_fix(info: &Info) -> &'static str {
    match info.cgroup_version.as_str() {
        "v2" => {
            "mkdir -p /etc/systemd/system/user@.service.d; printf '[Service]\\nDelegate=cpu memory pids\\n' \
             >/etc/systemd/system/user@.service.d/delegate.conf; systemctl daemon-reload; then log in again"
        }
        _ => {
            "cgroup v1 cannot limit rootless containers: add systemd.unified_cgroup_hierarchy=1 to \
             GRUB_CMDLINE_LINUX in /etc/default/grub; update-grub; reboot"
        }
    }
}
