# Does the same things to two trees that are the same, one of the image and one in memory, and tells what differs.
# Names that share a file part when it is changed, as on any overlay, so they are only moved here.
import os, sys, stat, mmap, shutil, errno, hashlib

def dump(r):
    out = []
    for root, ds, fs in os.walk(r):
        ds.sort()
        for n in sorted(ds + fs):
            p = root + '/' + n
            s = os.lstat(p)
            l = [p[len(r):], oct(s.st_mode), s.st_uid, s.st_gid]
            if not stat.S_ISDIR(s.st_mode): l += [s.st_nlink, s.st_size]
            if stat.S_ISLNK(s.st_mode): l.append(os.readlink(p))
            if stat.S_ISREG(s.st_mode):
                l.append(hashlib.md5(open(p, 'rb').read()).hexdigest())
                l += sorted((k, os.getxattr(p, k)) for k in os.listxattr(p) if k.startswith('user.'))
            out.append(l)
    return out

def ops():
    def w(p, mode, data):
        with open(p, mode) as f: f.write(data)
    def mm(p):
        with open(p, 'r+b') as f:
            m = mmap.mmap(f.fileno(), 0); m[5:10] = b'MMMMM'; m.flush(); m.close()
    def unlinked(p):
        f = open(p, 'r+'); os.unlink(p); f.write('zz'); f.seek(0); x = f.read(4); f.close(); return x
    def ro_then_write(p):
        a = open(p); b = open(p, 'a'); b.write('more'); b.close(); x = len(a.read()); a.close(); return x
    def scan_rm(p):
        n = 0
        with os.scandir(p) as it:
            for e in it:
                os.unlink(e.path); n += 1
        return n
    return [
        ('mv symlink', lambda r: os.rename(r+'/s', r+'/s2')),
        ('ln symlink', lambda r: os.link(r+'/dangling', r+'/dang2', follow_symlinks=False)),
        ('chown -h', lambda r: os.lchown(r+'/dangling', 7, 8)),
        ('touch -h', lambda r: os.utime(r+'/longlink', (5, 6), follow_symlinks=False)),
        ('mv longlink', lambda r: os.rename(r+'/longlink', r+'/ll')),
        ('mv dir', lambda r: os.rename(r+'/d', r+'/moved')),
        ('mv into', lambda r: os.rename(r+'/a', r+'/moved/sub/a')),
        ('mv over', lambda r: os.rename(r+'/moved/f', r+'/b')),
        ('mv dir over full', lambda r: os.rename(r+'/moved', r+'/full')),
        ('mv dir over file', lambda r: os.rename(r+'/moved', r+'/b')),
        ('mv file over dir', lambda r: os.rename(r+'/b', r+'/moved')),
        ('rmdir full', lambda r: os.rmdir(r+'/full')),
        ('mv dir over empty', lambda r: os.rename(r+'/full', r+'/e')),
        ('chmod', lambda r: os.chmod(r+'/b', 0o600)),
        ('chmod suid', lambda r: os.chmod(r+'/b', 0o6755)),
        ('append', lambda r: w(r+'/b', 'a', 'tail')),
        ('truncate', lambda r: os.truncate(r+'/big', 12345)),
        ('extend', lambda r: os.truncate(r+'/big', 54321)),
        ('mmap', lambda r: mm(r+'/big')),
        ('excl', lambda r: os.open(r+'/big', os.O_CREAT|os.O_EXCL|os.O_RDWR)),
        ('creat', lambda r: w(r+'/new', 'w', 'new')),
        ('xattr', lambda r: os.setxattr(r+'/new', 'user.k', b'v')),
        ('xattr lower', lambda r: os.setxattr(r+'/moved/sub/g', 'user.k', b'v')),
        ('rmxattr', lambda r: os.removexattr(r+'/new', 'user.k')),
        ('rmxattr none', lambda r: os.removexattr(r+'/new', 'user.none')),
        ('unlinked', lambda r: unlinked(r+'/moved/sub/a')),
        ('ro then write', lambda r: ro_then_write(r+'/moved/sub/g')),
        ('rm tree', lambda r: shutil.rmtree(r+'/e')),
        ('mkdir again', lambda r: os.makedirs(r+'/e/x')),
        ('ls again', lambda r: os.listdir(r+'/e/x')),
        ('rename self', lambda r: os.rename(r+'/b', r+'/b')),
        ('rename into self', lambda r: os.rename(r+'/moved', r+'/moved/sub/x')),
        ('scan rm', lambda r: scan_rm(r+'/links')),
        ('rmdir', lambda r: os.rmdir(r+'/links')),
        ('unlink fifo', lambda r: os.unlink(r+'/fifo')),
        ('long name', lambda r: w(r+'/'+'n'*255, 'w', 'x')),
        ('too long', lambda r: w(r+'/'+'n'*256, 'w', 'x')),
        ('odd name', lambda r: w(r.encode()+b'/\xff\xfe\n', 'w', 'x')),
        ('mknod', lambda r: os.mknod(r+'/dev', 0o600|stat.S_IFCHR, os.makedev(1, 3))),
        ('dev', lambda r: (os.major(os.lstat(r+'/dev').st_rdev), os.minor(os.lstat(r+'/dev').st_rdev))),
        ('fallocate', lambda r: os.posix_fallocate(os.open(r+'/new', os.O_RDWR), 0, 100000)),
        ('wh name', lambda r: w(r+'/.wh.x', 'w', 'x')),
        ('dir mtime', lambda r: os.utime(r+'/moved', (7, 8))),
        ('dir mtime?', lambda r: os.stat(r+'/moved').st_mtime),
        ('statvfs', lambda r: os.statvfs(r).f_namemax),
        ('symlink loop', lambda r: (os.symlink('loop', r+'/loop'), os.path.exists(r+'/loop'))[1]),
        ('hard link dir', lambda r: os.link(r+'/moved', r+'/hd')),
        ('O_DIRECTORY', lambda r: os.open(r+'/b', os.O_DIRECTORY)),
        ('O_NOFOLLOW', lambda r: os.open(r+'/s2', os.O_NOFOLLOW)),
        ('chown dir', lambda r: os.chown(r+'/moved', 1234567, 7654321)),
    ]

A, B = sys.argv[1], sys.argv[2]
bad = 0
for name, f in ops():
    res = []
    for r in (A, B):
        try: res.append(repr(f(r)))
        except OSError as e: res.append(errno.errorcode.get(e.errno, e.errno))
        except Exception as e: res.append(type(e).__name__)
    if res[0] != res[1]: bad += 1; print('DIFF', name, res)
    da, db = dump(A), dump(B)
    if da != db:
        bad += 1
        for x, y in zip(da, db):
            if x != y: print('TREE after', name, x, y); break
        else: print('TREE after', name, len(da), len(db))
print('differences:', bad)
