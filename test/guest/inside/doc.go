// Package inside tests what control groups do for a box: that its limits are set and enforced by the host, and that a limit that the
// host cannot enforce is refused. It runs in the guests of package guest, and as root on every host.
package inside
