#include <pthread.h>
#include <stdio.h>

enum { THREADS = 4, LIMIT = 2000000 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int next = 2, primes;

static void *count(void *arg) {
	for (;;) {
		pthread_mutex_lock(&lock);
		int from = next;
		next += 1000;
		pthread_mutex_unlock(&lock);
		if (from >= LIMIT)
			return arg;
		int found = 0;
		for (int n = from; n < from + 1000 && n < LIMIT; n++) {
			int d = 2;
			while (d * d <= n && n % d)
				d++;
			found += d * d > n;
		}
		pthread_mutex_lock(&lock);
		primes += found;
		pthread_mutex_unlock(&lock);
	}
}

int main(void) {
	pthread_t t[THREADS];
	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&t[i], NULL, count, NULL))
			return 1;
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	printf("%d\n", primes);
}
