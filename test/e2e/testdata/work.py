# A database; and TLS between two threads, with a certificate that the box makes itself.
import hashlib, os, socket, sqlite3, ssl, subprocess, threading

db = sqlite3.connect('work.db')
db.execute('create table t (x integer primary key, h text)')
with db:
    db.executemany('insert into t values (?, ?)', ((i, hashlib.sha256(b'%d' % i).hexdigest()) for i in range(20000)))
print(db.execute('select count(*), count(distinct h), sum(x) from t').fetchone(), db.execute('pragma integrity_check').fetchone()[0])

subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', 'key.pem',
                '-out', 'cert.pem', '-subj', '/CN=box', '-addext', 'subjectAltName=DNS:box.test'], check=True, capture_output=True)
listener = socket.create_server(('127.0.0.1', 0))
server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
server.load_cert_chain('cert.pem', 'key.pem')
sent = os.urandom(1 << 20)

def serve():
    conn, _ = listener.accept()
    with server.wrap_socket(conn, server_side=True) as s:
        s.sendall(sent)

thread = threading.Thread(target=serve)
thread.start()
client = ssl.create_default_context(cafile='cert.pem')
got = b''
with client.wrap_socket(socket.create_connection(listener.getsockname()), server_hostname='box.test') as s:
    print(s.version())
    while part := s.recv(65536):
        got += part
thread.join()
print(got == sent)
