//! Tests whether a program can reach a network.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::cli::doctor::wall::{Wall, WallResult};

/// Addresses that no sandbox may reach: the host in user-mode networks, a cloud's metadata service, the Internet.
const ADDRESSES: [&str; 5] =
    ["10.0.2.2:80", "169.254.169.254:80", "1.1.1.1:53", "[fd00:ec2::254]:80", "[2606:4700:4700::1111]:53"];

/// Looks for network interfaces, and tries to connect to outside addresses.
pub(super) fn network() -> io::Result<WallResult> {
    let interfaces = fs::read_to_string("/proc/net/dev")?;
    let names = interfaces.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    let mut holes: Vec<String> = names.filter(|name| *name != "lo").map(|name| format!("interface {name}")).collect();
    for address in ADDRESSES.iter().filter_map(|text| text.parse::<SocketAddr>().ok()) {
        if TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok() {
            holes.push(format!("reached {address}"));
        }
    }
    Ok(WallResult::from_holes(Wall::Network, "only a private loopback", &holes))
}
