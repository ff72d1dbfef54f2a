/* Stands between pyfuse3 and libfuse, for what pyfuse3 has no way to say: see desfs/levers.py.
 *
 * This library exports libfuse's fuse_session_new. Loaded with RTLD_GLOBAL before pyfuse3, it is found first when the
 * loader binds pyfuse3's call: a definition without a version satisfies a reference to fuse_session_new@FUSE_3.0 (glibc,
 * elf/dl-lookup.c). It hands pyfuse3's table of operations on with a few of them replaced.
 */
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 35
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <string.h>

/* From libfuse 3.17 on fuse_session_new is a macro over a function that takes the version of its caller's headers. */
#undef fuse_session_new
struct libfuse_version;
typedef struct fuse_session *new_session(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *new_versioned(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                           struct libfuse_version *, void *);

/* Set by Python before the session is made, and read by the one thread that serves requests. */
static int enabled, bound, opens_alone, lists_alone;
static unsigned max_background;
static struct fuse_conn_info agreed;
static struct fuse_lowlevel_ops ours, theirs;
static struct fuse_session *session;

static void init(void *userdata, struct fuse_conn_info *conn)
{
    if (theirs.init)
        theirs.init(userdata, conn);
    opens_alone = (conn->capable & FUSE_CAP_NO_OPEN_SUPPORT) != 0;
    lists_alone = (conn->capable & FUSE_CAP_NO_OPENDIR_SUPPORT) != 0;
    conn->max_background = max_background;
    conn->congestion_threshold = max_background / 4 * 3;
    /* Else O_TRUNC is left to an OPEN that is not sent any more; now it is a SETATTR, which is refused. */
    conn->want &= ~FUSE_CAP_ATOMIC_O_TRUNC;
    agreed = *conn;
}

static void open_file(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (opens_alone && (fi->flags & O_ACCMODE) == O_RDONLY && !(fi->flags & O_TRUNC))
        fuse_reply_err(req, ENOSYS); /* the kernel opens every file by itself from now on */
    else
        theirs.open(req, ino, fi);
}

static void open_directory(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (lists_alone)
        fuse_reply_err(req, ENOSYS);
    else
        theirs.opendir(req, ino, fi);
}

/* After ENOSYS the kernel has no handle to send, and pyfuse3 hands on nothing but the handle: make it the inode. */
static void read_file(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    fi->fh = ino;
    theirs.read(req, ino, size, off, fi);
}

static void list_directory(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    fi->fh = ino;
    theirs.readdirplus(req, ino, size, off, fi);
}

static void write_file(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *data, off_t off, struct fuse_file_info *fi)
{
    fi->fh = ino;
    theirs.write_buf(req, ino, data, off, fi);
}

static const struct fuse_lowlevel_ops *replaced(const struct fuse_lowlevel_ops *ops, size_t size)
{
    if (ops == &ours) /* libfuse's one function called by its other */
        return ops;
    bound = 1;
    if (!enabled || size > sizeof(ours) || !ops->open || !ops->opendir || !ops->read || !ops->readdirplus ||
        !ops->write_buf)
        return ops;
    memset(&theirs, 0, sizeof(theirs));
    memcpy(&theirs, ops, size);
    ours = theirs;
    ours.init = init;
    ours.open = open_file;
    ours.opendir = open_directory;
    ours.read = read_file;
    ours.readdirplus = list_directory;
    ours.write_buf = write_file;
    return &ours;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
                                      void *userdata)
{
    new_session *real = (new_session *)dlsym(RTLD_NEXT, "fuse_session_new");
    return session = real ? real(args, replaced(ops, size), size, userdata) : NULL;
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                                size_t size, struct libfuse_version *version, void *userdata)
{
    new_versioned *real = (new_versioned *)dlsym(RTLD_NEXT, "fuse_session_new_versioned");
    return session = real ? real(args, replaced(ops, size), size, version, userdata) : NULL;
}

static PyObject *enable(PyObject *self, PyObject *args)
{
    if (!PyArg_ParseTuple(args, "I", &max_background))
        return NULL;
    enabled = 1;
    Py_RETURN_NONE;
}

/* notify_store for many files in one call that holds no lock of Python's: (data, files, pages, skip, mark). Of each file
 * `files` has four u64: inode, offset in data, length, row; pages[row] says by a bit of `skip` that the kernel has it, and
 * is given `mark`. One that the kernel does not know (ENOENT) gets 0. Returns stored, unknown, failed, and the last errno.
 */
static PyObject *store_pages(PyObject *self, PyObject *args)
{
    Py_buffer data, files, pages;
    unsigned skip, mark, count[3] = {0, 0, 0};
    int error = 0, sound = 1;
    if (!PyArg_ParseTuple(args, "y*y*w*II", &data, &files, &pages, &skip, &mark))
        return NULL;
    const uint64_t(*file)[4] = files.buf;
    Py_ssize_t n = files.len / (Py_ssize_t)sizeof(*file);
    for (Py_ssize_t i = 0; i < n; i++)
        sound &= file[i][3] < (uint64_t)pages.len && file[i][1] <= (uint64_t)data.len &&
                 file[i][2] <= (uint64_t)data.len - file[i][1];
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; session && sound && i < n; i++) {
        volatile uint8_t *page = (uint8_t *)pages.buf + file[i][3];
        struct fuse_bufvec bytes = FUSE_BUFVEC_INIT(file[i][2]);
        if (*page & skip)
            continue;
        *page |= mark;
        bytes.buf[0].mem = (char *)data.buf + file[i][1];
        int result = fuse_lowlevel_notify_store(session, file[i][0], 0, &bytes, 0);
        if (result) {
            *page = 0;
            error = -result;
        }
        count[result == 0 ? 0 : result == -ENOENT ? 1 : 2]++;
    }
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&data);
    PyBuffer_Release(&files);
    PyBuffer_Release(&pages);
    if (!session || !sound) {
        PyErr_SetString(PyExc_ValueError, session ? "a file is not inside the buffers" : "there is no session");
        return NULL;
    }
    return Py_BuildValue("IIIi", count[0], count[1], count[2], error);
}

static PyObject *state(PyObject *self, PyObject *args)
{
    return Py_BuildValue("{s:N,s:N,s:N,s:I,s:I,s:I}", "bound", PyBool_FromLong(bound), "no_open",
                         PyBool_FromLong(opens_alone), "no_opendir", PyBool_FromLong(lists_alone), "max_background",
                         agreed.max_background, "max_readahead", agreed.max_readahead, "max_write", agreed.max_write);
}

static PyMethodDef methods[] = {
    {"enable", enable, METH_VARARGS, "Replace operations in the next session; max_background: requests in flight."},
    {"store_pages", store_pages, METH_VARARGS, "Put files into the kernel's page cache."},
    {"state", state, METH_NOARGS, "What the session came to."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_levers", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__levers(void)
{
    return PyModule_Create(&module);
}
