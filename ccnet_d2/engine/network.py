"""Which network interface leads to another machine."""

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def choose_interface(host: str) -> None:
    """Make gloo and NCCL talk over the interface that leads to `host`, unless the user chose one.

    Left alone, gloo takes the address of this machine's host name, which need not lead anywhere.
    """
    interface = interface_to(host)
    if interface is None:
        return
    for variable in _VARIABLES:
        if variable not in os.environ and not (variable.startswith("NCCL") and interface == "lo"):
            os.environ[variable] = interface


def interface_to(host: str) -> str | None:
    """Name of the interface over which packets to `host` leave; None where that cannot be told (IPv4 only)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: a datagram socket only looks up the route
        except OSError:
            return None
        address = probe.getsockname()[0]
        names = [name for _, name in socket.if_nameindex()]
        for name in names:
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    # 127.0.0.2 and the like are addresses of the loopback interface that it does not list.
    return "lo" if address.startswith("127.") and "lo" in names else None
