//! Tap interfaces.

#![expect(unsafe_code, reason = "ioctls of the tun driver and of sockets")]

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;

use anyhow::{Context, Result, ensure};
use libc::{IFF_NO_PI, IFF_TAP, IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS, TUNSETIFF, c_char, c_short, ifreq};
use nix::errno::Errno;

/// Opens a tap interface that is there, or makes one that goes away with the file, and turns it on. Returns its name too.
pub fn open(name: Option<&str>) -> Result<(File, String)> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    let mut request = request(name.unwrap_or("tap%d"))?;
    request.ifr_ifru.ifru_flags = c_short::try_from(IFF_TAP | IFF_NO_PI)?;
    ioctl(&file, TUNSETIFF, &mut request).with_context(|| format!("no tap interface {}", name.unwrap_or_default()))?;
    // The driver has filled in the name.
    let bytes = request.ifr_name.iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|byte| *byte != 0);
    let name = String::from_utf8(bytes.collect())?;
    turn_on(&name).with_context(|| format!("cannot turn {name} on"))?;
    Ok((file, name))
}

fn request(name: &str) -> Result<ifreq> {
    // SAFETY: it has integers alone, in arrays and a union of them.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    ensure!(name.len() < request.ifr_name.len(), "the name {name} is too long");
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = c_char::from_ne_bytes([from]));
    Ok(request)
}

fn turn_on(name: &str) -> Result<()> {
    // The kernel takes any socket.
    let socket = UnixDatagram::unbound()?;
    let mut request = request(name)?;
    ioctl(&socket, SIOCGIFFLAGS as _, &mut request)?;
    // SAFETY: the call has written the flags; any bits are valid ones.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = c_short::try_from(IFF_UP)?;
    if flags & up == 0 {
        request.ifr_ifru.ifru_flags = flags | up;
        ioctl(&socket, SIOCSIFFLAGS as _, &mut request)?;
    }
    Ok(())
}

fn ioctl(file: &impl std::os::fd::AsFd, number: libc::Ioctl, request: &mut ifreq) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the three calls take a pointer to an ifreq, which lives until they return.
    let result = unsafe { libc::ioctl(fd, number, std::ptr::from_mut(request)) };
    Errno::result(result)?;
    Ok(())
}
